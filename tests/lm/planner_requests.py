"""How tests ask a planner for plans."""

from __future__ import annotations

from acestep.lm.planner import Planner
from acestep.lm.work import PlannerWork, PlanWork, Sample
from acestep.plan import Plan
from acestep.request import SongRequest

GIVEN = {"bpm": 120, "key_scale": "A minor", "time_signature": "4"}


def ask(planner: Planner, work: PlannerWork) -> Plan | Sample:
    return planner.submit(work).result(timeout=120)


def plan(planner: Planner, max_duration: float = 20.0, **fields: object) -> Plan:
    request = SongRequest.model_validate({"prompt": "a calm piano", "lyrics": "la la", "seed": 5, **fields})
    result = ask(planner, PlanWork(request, max_duration))
    assert isinstance(result, Plan)
    return Plan.model_validate_json(result.model_dump_json())
