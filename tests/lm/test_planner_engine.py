"""The engine between tickets and rows: order, cancellation, reservation, failure."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from acestep.errors import InvalidOutput, LimitExceeded
from acestep.lm.decoder import Decoder
from acestep.lm.engine import PlannerEngine
from acestep.lm.flows import FlowBuilder
from acestep.lm.grammar import CodesProgram, Grammar
from acestep.lm.job import Job
from acestep.lm.loading import load_model
from acestep.lm.model import PlannerModel
from acestep.lm.planner import Planner
from acestep.lm.prompts import PromptBuilder
from acestep.lm.sampling import SamplingParams
from acestep.lm.work import PlanWork
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.stage_settings import PlannerSettings
from acestep.worker import Ticket

GIVEN = {"bpm": 120, "key_scale": "A minor", "time_signature": "4"}


def song(seed: int = 1, **fields: object) -> PlanWork:
    return PlanWork(SongRequest.model_validate({"prompt": "x", "duration": 10, "seed": seed, **GIVEN, **fields}))


@pytest.fixture
def engine(model: PlannerModel, grammar: Grammar) -> PlannerEngine:
    return make_engine(model, grammar, rows=4, tokens=4_000)


def make_engine(model: PlannerModel, grammar: Grammar, *, rows: int, tokens: int) -> PlannerEngine:
    decoder = Decoder(model, grammar, rows=rows, arena_tokens=tokens)
    return PlannerEngine(decoder, FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 2_048, rows, tokens), {})


def finish(engine: PlannerEngine) -> None:
    while engine.step():
        pass


def test_no_more_than_fits_is_taken(engine: PlannerEngine) -> None:
    tickets = [Ticket(song(i)) for i in range(3)]
    for ticket in tickets[:2]:
        assert engine.has_room(ticket)
        engine.add(ticket)
    assert not engine.has_room(tickets[2])
    finish(engine)
    assert engine.has_room(tickets[2])
    assert all(t.future.done() for t in tickets[:2])


def test_a_later_phase_goes_before_newcomers(engine: PlannerEngine) -> None:
    """A song whose metadata took one row needs four for its codes: newcomers wait until it has them."""
    first = Ticket(song(bpm=None, batch_size=2, use_cot_caption=False))
    other = Ticket(song(2, duration=40))
    engine.add(first)
    engine.add(other)
    while engine.stats()["waiting_jobs"] == 0 and not first.future.done():
        engine.step()
    assert engine.stats()["waiting_jobs"] == 1
    assert not engine.has_room(Ticket(song(3)))
    finish(engine)
    assert first.future.done()
    assert other.future.done()


def test_cancelled_work_is_gone_before_the_next_step(engine: PlannerEngine) -> None:
    keep, drop = Ticket(song(1)), Ticket(song(2, batch_size=1))
    engine.add(keep)
    engine.add(drop)
    for _ in range(5):
        engine.step()
    rows, reserved = engine.stats()["slots_used"], engine.stats()["kv_reserved_bytes"]
    engine.remove(drop)
    assert engine.stats()["slots_used"] == rows - 2
    assert engine.stats()["kv_reserved_bytes"] < reserved
    finish(engine)
    alone = Ticket(song(1))
    engine.add(alone)
    finish(engine)
    assert keep.result().codes == alone.result().codes
    assert not drop.future.done()


def test_work_that_is_dropped_while_it_waits_leaves_nothing(engine: PlannerEngine) -> None:
    for n in range(2):
        engine.add(Ticket(song(n)))
    waiting = [Ticket(song(n)) for n in range(3)]
    gone = weakref.ref(waiting[0])
    assert not any(engine.has_room(ticket) for ticket in waiting)
    del waiting[0]
    gc.collect()
    assert gone() is None


def test_work_that_can_never_fit_is_refused_when_added(model: PlannerModel, grammar: Grammar) -> None:
    engine = make_engine(model, grammar, rows=4, tokens=300)
    ticket = Ticket(song(duration=60))
    assert engine.has_room(ticket)
    with pytest.raises(LimitExceeded) as failure:
        engine.add(ticket)
    assert failure.value.details["limit"] == 300 < failure.value.details["asked"]


def test_items_that_do_not_fit_together_take_turns(model: PlannerModel, grammar: Grammar) -> None:
    engine = make_engine(model, grammar, rows=8, tokens=1_000)
    ticket = Ticket(song(duration=30, batch_size=4))
    engine.add(ticket)
    assert engine.stats()["waiting_jobs"] > 0
    finish(engine)
    codes = ticket.result().codes
    roomy = Ticket(song(duration=30, batch_size=4))
    other = make_engine(model, grammar, rows=8, tokens=8_000)
    other.add(roomy)
    finish(other)
    assert codes == roomy.result().codes


def test_one_songs_defect_does_not_stop_the_others(engine: PlannerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Ticket(song(1)), Ticket(song(2, duration=11))
    engine.add(good)
    engine.add(bad)
    read = FlowBuilder._read_codes

    def broken(self: FlowBuilder, program: CodesProgram, *rest: Any) -> tuple[int, ...]:
        if len(program.codes) == 55:
            raise ZeroDivisionError
        return read(self, program, *rest)

    monkeypatch.setattr(FlowBuilder, "_read_codes", broken)
    finish(engine)
    assert good.result().codes
    assert type(bad.future.exception()).__name__ == "Internal"
    assert engine.stats()["songs"] == 0 == engine.stats()["slots_used"]


def test_numbers_that_are_not_finite_are_an_error(checkpoint: Path, grammar: Grammar) -> None:
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32, max_len=256)
    model.layers[1].down[3, 3] = torch.nan
    decoder = Decoder(model, grammar, rows=2, arena_tokens=512, static_len=256)
    decoder.add(Job([1, 2, 3], None, [(CodesProgram(grammar.tokenizer, 5, limit=5), 0)], SamplingParams()))
    with pytest.raises(InvalidOutput):
        decoder.step()
    decoder.reset()
    assert decoder.rows_used == 0
    assert all(bool(k.isfinite().all()) for k in decoder.arena.keys)


def test_the_queue_is_served_by_priority(checkpoint: Path) -> None:
    planner = Planner.load(checkpoint, PlannerSettings(slots=2, max_len=1_024))
    order: list[int] = []
    tickets = [planner.submit(song(n, duration=20), priority=float(-n)) for n in range(6)]
    for n, ticket in enumerate(tickets):
        ticket.future.add_done_callback(lambda _, n=n: order.append(n))
    for ticket in tickets:
        ticket.result(timeout=60)
    planner.close()
    assert order[1:] == sorted(order[1:], reverse=True)


def test_memory_is_flat_over_five_hundred_songs(checkpoint: Path) -> None:
    planner = Planner.load(checkpoint, PlannerSettings(slots=16, max_len=512))
    rng = random.Random(0)
    short = Plan(metadata=Metadata(duration=2.0))
    process = psutil.Process()
    rss = []
    for _ in range(5):
        tickets = [planner.submit(song(rng.randrange(1_000), duration=None, plan=short)) for _ in range(100)]
        for ticket in tickets[::20]:
            planner.cancel(ticket)
        assert sum(isinstance(t.future.exception(timeout=120), Exception) for t in tickets) <= 5
        assert isinstance(tickets[1].result(), Plan)
        del tickets, ticket
        gc.collect()
        rss.append(process.memory_info().rss)
        assert planner.stats()["kv_reserved_bytes"] == 0 == planner.stats()["slots_used"]
    planner.close()
    assert rss[-1] - rss[1] < 8 << 20, rss


@pytest.mark.parametrize("static_len", [None, 512])
def test_sixteen_bit_weights_and_plain_attention_give_valid_codes(
    checkpoint: Path, grammar: Grammar, static_len: int | None
) -> None:
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16, max_len=512)
    decoder = Decoder(model, grammar, rows=4, arena_tokens=2_048, static_len=static_len, attention="eager")
    programs = [CodesProgram(grammar.tokenizer, 20, limit=20) for _ in range(2)]
    decoder.add(Job([5, 6, 7], [8, 9], [(p, n) for n, p in enumerate(programs)], SamplingParams(cfg_scale=2.0)))
    while decoder.jobs:
        decoder.step()
    assert [len(p.codes) for p in programs] == [20, 20]
    assert programs[0].codes != programs[1].codes
    assert decoder.invariant_rows is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="here graphs can be recorded")
def test_without_graphs_static_shapes_run_eagerly(
    model: PlannerModel, grammar: Grammar, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = Decoder(model, grammar, rows=2, arena_tokens=1_024, static_len=512, capture=True)
    assert decoder.graphs == 0
    assert "eagerly" in caplog.text
    program = CodesProgram(grammar.tokenizer, 5, limit=5)
    decoder.add(Job([5, 6, 7], None, [(program, 0)], SamplingParams()))
    while decoder.jobs:
        decoder.step()
    assert len(program.codes) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_graphs_give_the_codes_of_eager_decoding(checkpoint: Path, grammar: Grammar) -> None:
    model = load_model(checkpoint, device=torch.device("cuda", 0), dtype=torch.float32, max_len=512)

    def codes(capture: bool) -> list[list[int]]:
        decoder = Decoder(model, grammar, rows=4, arena_tokens=2_048, static_len=512, capture=capture)
        assert bool(decoder.graphs) == capture
        programs = [CodesProgram(grammar.tokenizer, 40, limit=40) for _ in range(2)]
        decoder.add(Job([5, 6, 7], [8, 9], [(p, n) for n, p in enumerate(programs)], SamplingParams(cfg_scale=2.0)))
        while decoder.jobs:
            decoder.step()
        return [p.codes for p in programs]

    assert codes(capture=True) == codes(capture=False)
