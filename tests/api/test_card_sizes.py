"""All card sizes: the stages and the application as they are in `e2e/test_redeployed.py`, which has some, without Serve between them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from deployments.config.args import PlannerArgs, RendererArgs, parse_args
from deployments.config.options import settled
from deployments.fleet.watch import FleetView, Pool
from deployments.stages.planner import PlannerDeployment
from deployments.stages.renderer import RendererDeployment
from tests.card_sizes import ARGS, ASKED, SIZES, Size, check_answers, check_renderer

from .conftest import Build


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.gib:g}")
async def test_a_card_of_this_size(build: Build, size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in size.env.items():
        monkeypatch.setenv(name, value)
    plans = settled(parse_args(PlannerArgs, ARGS, "lm"), default_share=0.4)
    renders = settled(parse_args(RendererArgs, ARGS, "dit"), default_share=0.6)
    planner = PlannerDeployment(plans.model_dump(mode="json"))
    renderer = RendererDeployment(renders.model_dump(mode="json"))
    told = await renderer.describe()
    check_renderer(size, told)
    pools = (
        Pool("dit", "render", renders, status="RUNNING", running=1, info=told),
        Pool("lm", "plan", plans, status="RUNNING", running=1, info=await planner.describe()),
    )
    site = build(view=FleetView(pools=pools, at=time.time(), http_host="127.0.0.1"))
    job = (await site.client.post("/v1/music", json=ASKED)).json()
    strict = await site.client.post("/v1/music", json={**ASKED, "strict": True})
    check_answers(size, job, (strict.status_code, strict.json()))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("format", {"caption": "a song"}), ("inspire", {"query": "a song"}), ("understand", {"codes": [1]})],
)
async def test_a_simulated_planner_says_that_it_writes_no_texts(
    kind: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SIZES[-1].env.items():
        monkeypatch.setenv(name, value)
    planner = PlannerDeployment(settled(parse_args(PlannerArgs, ARGS, "lm"), default_share=0.4).model_dump(mode="json"))
    told = (await planner.ask(kind, {**fields, "max_duration": 60.0}))["error"]
    assert (told["type"], told["message"]) == ("unavailable", "the simulated engine writes no texts")
