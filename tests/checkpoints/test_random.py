"""Random checkpoints of a chosen size, by which cards are tried without a download."""

from __future__ import annotations

from pathlib import Path

import torch

from acestep.checkpoints import resolve
from acestep.checkpoints.load import load_renderer
from acestep.lm.planner import Planner
from acestep.lm.work import PlanWork
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import TINY_NOTICE
from acestep.stage_settings import PlannerSettings
from benchmarks.checkpoints import PLANNERS, RENDERERS, write_planner, write_renderer

CPU = torch.device("cpu")


def test_they_are_loaded_as_published_ones_are_and_say_that_they_make_noise(tmp_path: Path) -> None:
    found = resolve(str(write_renderer(tmp_path, "mid", CPU)), "renderer")
    assert (found.name, found.notice) == (RENDERERS["mid"], TINY_NOTICE)
    parts = load_renderer(found, device=CPU, dtype=torch.float32)
    assert parts.is_turbo
    assert parts.transformer.config.hidden_size == 384
    folder = write_planner(tmp_path, "mid", CPU)
    assert resolve(str(folder), "planner").notice == TINY_NOTICE
    planner = Planner.load(folder, PlannerSettings(slots=2, max_len=512), name=PLANNERS["mid"])
    try:
        request = SongRequest(prompt="calm", duration=10, bpm=92, key_scale="A minor", time_signature="4", seed=1)
        plan = planner.submit(PlanWork(request)).result()
    finally:
        planner.close()
    assert isinstance(plan, Plan)
    assert len(plan.codes[0]) == 50
    assert plan.notice == TINY_NOTICE
