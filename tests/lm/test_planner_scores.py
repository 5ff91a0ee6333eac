"""The planner's own score against transformers' Qwen3, and what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from oracle import Oracle

from acestep.lm import weighing
from acestep.lm.decoder import Decoder
from acestep.lm.engine import PlannerEngine
from acestep.lm.flows import FlowBuilder
from acestep.lm.grammar import Grammar
from acestep.lm.loading import load_model
from acestep.lm.model import PlannerModel
from acestep.lm.planner import Planner
from acestep.lm.prompts import PromptBuilder
from acestep.lm.scores import scored
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.lm.weighing import WeighingJob
from acestep.lm.work import PlanWork
from acestep.plan import NO_PLANNER_SCORES, Metadata, Plan
from acestep.request import SongRequest
from acestep.worker import Ticket

SONG = {"prompt": "a calm piano", "lyrics": "[Verse]\nla la\nlights go by", "duration": 10, "seed": 5}


def work(**fields: object) -> PlanWork:
    return PlanWork(SongRequest.model_validate({**SONG, **fields}), 20.0)


def plan(planner: Planner, **fields: object) -> Plan:
    result = planner.submit(work(**fields)).result(timeout=120)
    assert isinstance(result, Plan)
    return Plan.model_validate_json(result.model_dump_json())


class Reference:
    """The formulas on whole logits of whole sequences."""

    def __init__(self, oracle: Oracle) -> None:
        self.model = oracle.model

    @torch.inference_mode()
    def logits(self, prompt: list[int], target: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]

    def logprob(self, prompt: list[int], target: list[int]) -> float:
        logprobs = self.logits(prompt, target).log_softmax(-1)
        return float(logprobs[torch.arange(len(target)), torch.tensor(target)].mean())

    def recall(self, prompt: list[int], target: list[int]) -> float:
        top = self.logits(prompt, target).topk(10).indices.tolist()
        found = [1 - best.index(token) / 10 if token in best else 0.0 for best, token in zip(top, target, strict=True)]
        return sum(found) / len(found)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, grammar: Grammar) -> Reference:
    return Reference(Oracle(checkpoint, grammar))


def answer(t: PlannerTokenizer, inside: str, after: str = "\n") -> list[int]:
    return [t.think, *t.encode(inside), t.end_think, *t.encode(after)]


def test_the_numbers_are_those_of_the_formulas(
    planner: Planner, reference: Reference, tokenizer: PlannerTokenizer
) -> None:
    made = plan(planner, score=True, batch_size=2, bpm=120)
    assert len(made.scores) == 2
    assert made.codes is not None
    assert made.codes[0] != made.codes[1]
    assert made.adjustments == ()
    prompts = PromptBuilder(tokenizer)
    m = made.metadata
    assert m.caption
    prompt_without = prompts.understand(())
    texts = {
        "caption": prompts.reasoning(Metadata(caption=m.caption)),
        "lyrics": answer(tokenizer, "\n", f"\n# Lyric\n{SONG['lyrics']}\n"),
    }
    assert "caption: " in tokenizer.decode(texts["caption"])
    fields = {
        "bpm": "120", "duration": "10", "keyscale": str(m.keyscale), "language": str(m.language),
        "timesignature": str(m.timesignature),
    }  # fmt: skip
    for codes, scores in zip(made.codes, made.scores, strict=True):
        assert scores is not None
        prompt = prompts.understand(codes)
        expected = {}
        for name, ids in texts.items():
            gain = reference.logprob(prompt, ids) - reference.logprob(prompt_without, ids)
            expected[name] = 1 / (1 + math.exp(-gain / 0.1))
        for name, text in fields.items():
            quoted = f"'{text}'" if text == "no" else text
            expected[name] = reference.recall(prompt, answer(tokenizer, f"\n{name}: {quoted}\n"))
        mean = sum(expected[name] for name in fields) / len(fields)
        expected["total"] = 0.5 * expected["caption"] + 0.3 * expected["lyrics"] + 0.2 * mean
        assert scores.model_dump() == pytest.approx(expected, abs=2e-4)
    assert made.timings.scores_s > 0


def test_long_texts_are_read_in_chunks(
    either_decoder: Decoder, reference: Reference, tokenizer: PlannerTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighing, "_CHUNK", 7)
    monkeypatch.setattr(weighing, "_LOGIT_ROWS", 3)
    prompt = PromptBuilder(tokenizer).understand(tuple(range(30)))
    targets = [tokenizer.encode("one two three, a much longer text with words of its own"), tokenizer.encode("x")]
    job = WeighingJob(prompt, targets)
    either_decoder.add(job)
    assert either_decoder.rows_used == 1
    while either_decoder.busy:
        either_decoder.step()
    assert either_decoder.rows_used == either_decoder.arena.reserved_tokens == 0
    for target, weights in zip(targets, job.weights, strict=True):
        logits = reference.logits(prompt, target)
        own = logits[torch.arange(len(target)), torch.tensor(target)]
        logprobs = logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
        assert weights.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)
        assert list(weights.ranks) == (1 + (logits > own[:, None]).sum(1)).tolist()


def test_it_changes_nothing_of_any_plan(planner: Planner) -> None:
    """Neither of its own song nor of those in flight beside it."""
    alone = plan(planner, batch_size=2)
    tickets = [planner.submit(work(batch_size=2, score=score)) for score in (True, False, True)]
    for ticket, score in zip(tickets, (True, False, True), strict=True):
        made = ticket.result(timeout=120)
        assert isinstance(made, Plan)
        assert bool(made.scores) == score
        left_out = {"timings", "scores"}
        assert made.model_dump(exclude=left_out) == alone.model_dump(exclude=left_out)


def test_weights_are_shared_out_anew(planner: Planner) -> None:
    given = {"bpm": 120, "key_scale": "A minor", "time_signature": "4", "lyrics": "[Instrumental]"}
    (scores,) = plan(planner, score=True, **given).scores
    assert scores is not None
    assert scores.lyrics is None
    assert scores.language is None
    assert scores.caption is not None  # of the prompt: the planner wrote none
    rest = [scores.bpm, scores.duration, scores.keyscale, scores.timesignature]
    mean = sum(value for value in rest if value is not None) / len(rest)
    assert scores.total == pytest.approx((0.5 * scores.caption + 0.2 * mean) / 0.7, abs=2e-4)


def test_without_codes_or_unasked_there_is_none(planner: Planner) -> None:
    assert plan(planner, score=True, thinking=False).scores == ()
    assert plan(planner).scores == ()


def test_what_is_too_long_to_be_read_has_no_score(tokenizer: PlannerTokenizer) -> None:
    request = SongRequest.model_validate({**SONG, "score": True})
    made = Plan(metadata=Metadata(bpm=120), codes=((1,) * 50,))
    with pytest.raises(StopIteration) as ended:  # without any job
        next(scored(PromptBuilder(tokenizer), request, made, 100))
    result = ended.value.value
    assert result.scores == (None,)
    (told,) = result.adjustments
    assert (told.field, told.given) == ("score", NO_PLANNER_SCORES)
    assert "100 tokens" in told.reason


@pytest.mark.parametrize("static", [False, True])
def test_numbers_that_are_not_finite_cost_the_score_and_not_the_song(
    checkpoint: Path, grammar: Grammar, monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32, max_len=2_048)
    decoder = Decoder(model, grammar, rows=4, arena_tokens=8_192, static_len=2_048 if static else None)
    flows = FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 2_048, 4, 8_192)
    engine = PlannerEngine(decoder, flows, {})
    step, down = decoder._weigher.step, model.layers[1].down
    value = float(down[3, 3])

    def broken(job: WeighingJob) -> None:  # the weights are only broken while texts are weighed
        down[3, 3] = torch.nan
        step(job)
        down[3, 3] = value

    monkeypatch.setattr(decoder._weigher, "step", broken)
    tickets = [Ticket(work(score=True, seed=seed)) for seed in (1, 2)]
    for ticket in tickets:
        engine.add(ticket)
        while engine.step():
            pass
        made = ticket.future.result(timeout=0)
        assert isinstance(made, Plan)
        assert made.codes is not None
        assert made.scores == (None,)
        assert [a.field for a in made.adjustments] == ["score"]
        assert "not finite" in made.adjustments[0].reason
    assert decoder.rows_used == decoder.arena.reserved_tokens == 0
    assert all(bool(k.isfinite().all()) for k in (decoder.arena.keys if static else []))


def test_memory_that_ends_while_texts_are_weighed_costs_the_score_alone(
    model: PlannerModel, grammar: Grammar, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(model, grammar, rows=4, arena_tokens=8_192)
    engine = PlannerEngine(decoder, FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 2_048, 4, 8_192), {})

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(decoder.heads, "all_logits", full)
    ticket = Ticket(work(score=True))
    engine.add(ticket)
    while engine.step():
        pass
    made = ticket.future.result(timeout=0)
    assert isinstance(made, Plan)
    assert made.codes is not None
    assert [a.reason for a in made.adjustments] == ["the planner's score is left out: the planner ran out of memory"]
    assert decoder.rows_used == decoder.arena.reserved_tokens == 0


def test_a_song_that_is_cancelled_while_it_is_weighed_frees_its_rows(model: PlannerModel, grammar: Grammar) -> None:
    decoder = Decoder(model, grammar, rows=4, arena_tokens=8_192)
    engine = PlannerEngine(decoder, FlowBuilder(grammar, PromptBuilder(grammar.tokenizer), 2_048, 4, 8_192), {})
    ticket = Ticket(work(score=True, batch_size=2))
    engine.add(ticket)
    while not decoder.weighing:
        assert engine.step()
    engine.remove(ticket)
    assert not decoder.busy
    assert decoder.rows_used == decoder.arena.reserved_tokens == 0
