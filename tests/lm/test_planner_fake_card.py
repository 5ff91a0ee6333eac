"""The planner on a card that is only pretended: loaded and decoded as there, through recorded graphs, with the plans of the CPU; and a step
makes the host wait once, for the tokens that were drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from acestep.lm import loading
from acestep.lm.decoder import Decoder
from acestep.lm.grammar import CodesProgram, Grammar
from acestep.lm.job import Job
from acestep.lm.model import PlannerModel
from acestep.lm.planner import Planner
from acestep.lm.sampling import SamplingParams
from acestep.lm.work import PlannerWork, PlanWork
from acestep.request import SongRequest
from acestep.stage_settings import PlannerSettings
from tests.fake_card import FakeCard

GIVEN = {"bpm": 120, "key_scale": "A minor", "time_signature": "4", "use_cot_caption": False}


@pytest.fixture
def on_card(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A planner that was loaded onto the card, for the duration of a block."""

    class OntoCard:
        def __init__(self, file: Path, framework: str, device: str) -> None:
            self._file, self._device = safetensors.safe_open(file, framework, device="cpu"), device

        def keys(self) -> list[str]:
            return self._file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            return self._file.get_tensor(name).to(self._device)

    @contextmanager
    def loaded(**settings: Any) -> Iterator[tuple[FakeCard, Planner]]:
        monkeypatch.setattr(loading, "safe_open", OntoCard)
        with FakeCard() as card:
            planner = Planner.load(checkpoint, PlannerSettings(device="cuda", compile=True, **{**SETTINGS, **settings}))
            try:
                yield card, planner
            finally:
                planner.close()

    return loaded


def plan(seed: int = 3, duration: float = 10, **fields: Any) -> PlanWork:
    return PlanWork(SongRequest(**{"prompt": "slow jazz", "duration": duration, "seed": seed, **fields}))


def asked(planner: Planner, works: list[PlannerWork]) -> list[Any]:
    return [
        ticket.result(120).model_copy(update={"timings": None}) for ticket in [planner.submit(work) for work in works]
    ]


WORKS: dict[str, list[PlannerWork]] = {
    "codes": [plan(**GIVEN)],
    "metadata": [plan(use_cot_caption=False)],
    "a batch": [plan(batch_size=3, **GIVEN)],
    "greedy": [plan(lm_temperature=0.0, **GIVEN)],
    "without guidance": [plan(lm_cfg_scale=1.0, **GIVEN)],
    "top k and top p": [plan(lm_top_k=40, lm_top_p=0.5, **GIVEN)],
    "penalty": [plan(lm_repetition_penalty=1.2, **GIVEN)],
    "company": [plan(seed, 10 + seed, **GIVEN) for seed in range(3)] + [plan(9, use_cot_caption=False)],
    "caption": [plan(thinking=False)],
    "scored": [plan(score=True, **GIVEN)],
}
SETTINGS = {"slots": 12, "max_len": 400}


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Path) -> Iterator[Planner]:
    planner = Planner.load(checkpoint, PlannerSettings(**SETTINGS))
    yield planner
    planner.close()


@pytest.mark.parametrize("works", WORKS)
def test_plans_are_those_of_the_cpu(on_card: Any, on_cpu: Planner, works: str) -> None:
    with on_card() as (card, planner):
        assert planner.info.graphs
        card.waits.clear()
        made = asked(planner, WORKS[works])
        steps = planner.stats()["steps"]
    assert made == asked(on_cpu, WORKS[works])
    # Of what is drawn and of what is weighed; and once more where a token was drawn outside its nucleus.
    assert {wait.partition(":")[0] for wait in card.waits} <= {"lm/decoder.py _read", "lm/weighing.py _weights"}
    if works == "greedy":
        assert card.waits.total() <= steps + 1


def test_no_attention_in_half_precision_holds_all_scores(on_card: Any) -> None:
    with on_card(dtype="bfloat16", max_len=2_048) as (card, planner):
        asked(planner, [plan(prompt="slow jazz " * 90, **GIVEN)])  # read in more than one piece
    assert not card.attention


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets only where there is no card")
def test_the_triton_kernel_in_a_recorded_graph(model: PlannerModel, grammar: Grammar, on_card: Any) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from acestep.lm.decode_kernel import decode_attention

    def codes(model: PlannerModel, **how: Any) -> list[int]:
        decoder = Decoder(model, grammar, rows=2, arena_tokens=256, **how)
        program = CodesProgram(grammar.tokenizer, 3, limit=3)
        decoder.add(Job([5, 6, 7], [8, 9], [(program, 0)], SamplingParams(cfg_scale=2.0)))
        while decoder.jobs:
            decoder.step()
        return program.codes

    with on_card() as (card, planner):
        there = planner._thread.engine._decoder.model
        kernel = lambda *args: card.run(decode_attention, args, {})  # noqa: E731
        assert codes(there, static_len=128, kernel=kernel, capture=True) == codes(model)
