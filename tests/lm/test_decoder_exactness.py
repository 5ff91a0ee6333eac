"""Batched decoding against naive decoding, token by token."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from company import written_among
from oracle import Oracle

from acestep.lm.decoder import Decoder
from acestep.lm.grammar import CodesProgram, Grammar, OpenProgram, Program
from acestep.lm.job import Job
from acestep.lm.sampling import SamplingParams


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, grammar: Grammar) -> Oracle:
    return Oracle(checkpoint, grammar)


@dataclass
class Case:
    """A job that can be made again for the oracle."""

    prompt: list[int]
    uncond: list[int] | None
    make: Callable[[], Program]
    seeds: list[int]
    params: SamplingParams

    def job(self) -> Job:
        return Job(self.prompt, self.uncond, [(self.make(), seed) for seed in self.seeds], self.params)


def random_case(rng: random.Random, grammar: Grammar) -> Case:
    t = grammar.tokenizer
    prompt = [rng.randrange(t.text_size) for _ in range(rng.choice([3, 20, 60, 700]))]
    uncond = [rng.randrange(t.text_size) for _ in range(rng.randint(2, 40))] if rng.random() < 0.6 else None
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.85, 1.0, 1.3]),
        top_k=rng.choice([0, 0, 5, 300]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        cfg_scale=rng.choice([1.5, 2.0, 4.0]) if uncond else 1.0,
    )
    count, limit = rng.randint(1, 40), rng.randint(5, 30)
    known = {"bpm": "120", "keyscale": "A minor"} if rng.random() < 0.5 else {}
    caption = rng.choice([0, 12])
    make: Callable[[], Program] = rng.choice([
        lambda: CodesProgram(t, count, limit=count),
        lambda: CodesProgram(t, count, limit=count),
        lambda: CodesProgram(t, None, limit=limit),
        lambda: OpenProgram([t.eos, t.pad], limit=limit),
        lambda: grammar.plan(known, max_duration=240, caption_tokens=caption),
        lambda: grammar.plan({}, max_duration=60, caption_tokens=caption, lyrics_tokens=20),
    ])  # fmt: skip
    return Case(prompt, uncond, make, [rng.randrange(2**63) for _ in range(rng.choice([1, 1, 2, 4]))], params)


def test_fifty_mixed_jobs_with_joins_leaves_and_cancels_equal_naive_decoding(
    either_decoder: Decoder, grammar: Grammar, oracle: Oracle
) -> None:
    decoder = either_decoder
    rng = random.Random(7)
    waiting = [random_case(rng, grammar) for _ in range(50)]
    running: dict[Job, Case] = {}
    finished: list[tuple[Job, Case]] = []
    cancelled = most_rows = 0
    while waiting or running:
        while waiting and rng.random() < 0.6 and decoder.fits(job := waiting[-1].job()):
            running[job] = waiting.pop()
            decoder.add(job)
        if running and rng.random() < 0.06:
            victim = rng.choice(list(running))
            del running[victim]
            decoder.remove(victim)
            cancelled += 1
        most_rows = max(most_rows, decoder.rows_used)
        if decoder.jobs:
            finished += [(job, running.pop(job)) for job in decoder.step()]
    assert cancelled >= 3
    assert len(finished) == 50 - cancelled
    assert most_rows >= 10
    assert decoder.rows_used == 0
    assert decoder.arena.allocator.free == decoder.arena.allocator.capacity
    for job, case in finished:
        for output, seed in zip(job.outputs, case.seeds, strict=True):
            assert output.written == oracle.decode(case.prompt, case.uncond, case.make(), seed, case.params), case


def test_greedy_codes_equal_transformers_generate_with_guidance(
    decoder: Decoder, grammar: Grammar, oracle: Oracle
) -> None:
    t = grammar.tokenizer
    prompt, uncond = t.encode("A calm piano and drums"), t.encode("NO USER INPUT at all, nothing")
    program = CodesProgram(t, 40, limit=40)
    job = Job(prompt, uncond, [(program, 0)], SamplingParams(temperature=0.0, cfg_scale=2.5))
    decoder.add(job)
    while decoder.jobs:
        decoder.step()
    others = [i for i in range(t.size) if not t.first_code <= i < t.first_code + t.num_codes]
    expected = oracle.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        guidance_scale=2.5, negative_prompt_ids=torch.tensor([uncond]),
        negative_prompt_attention_mask=torch.ones(1, len(uncond), dtype=torch.long),
        suppress_tokens=others, max_new_tokens=40, eos_token_id=None,
    )  # fmt: skip
    assert job.outputs[0].written == expected[0, len(prompt) :].tolist()


def test_a_song_has_the_same_codes_alone_and_in_any_company(decoder: Decoder, grammar: Grammar) -> None:
    """Bit for bit, not by luck: the hidden states are compared, too."""
    if decoder.invariant_rows is None:
        pytest.skip("this machine's matrix products depend on the batch")
    rng = random.Random(3)
    t = grammar.tokenizer
    prompt, uncond = t.encode("A song"), t.encode("NO")

    def run(company: int) -> tuple[list[int], torch.Tensor]:
        job = Job(prompt, uncond, [(CodesProgram(t, 30, limit=30), 11)], SamplingParams(0.85, top_p=0.9, cfg_scale=2.0))
        return written_among(decoder, job, (random_case(rng, grammar).job() for _ in range(company)))

    alone, states = run(0)
    for company in (1, 3, 9):
        together, others = run(company)
        assert together == alone
        assert torch.equal(others, states)


def test_reserved_memory_is_exactly_what_is_used(decoder: Decoder, grammar: Grammar) -> None:
    t = grammar.tokenizer
    prompt, uncond = t.encode("A song with a piano"), t.encode("NO USER INPUT")
    job = Job(prompt, uncond, [(CodesProgram(t, 25, limit=25), s) for s in (1, 2)], SamplingParams(cfg_scale=2.0))
    decoder.add(job)
    spans = [row.span for output in job.outputs for row in output.rows]
    assert decoder.arena.reserved_bytes == sum(span.size for span in spans) * decoder.arena.bytes_per_token
    while decoder.jobs:
        decoder.step()
    assert all(span.used == span.size for span in spans)
    assert decoder.arena.reserved_bytes == 0 == decoder.arena.used_bytes


def test_forced_runs_take_one_forward(decoder: Decoder, grammar: Grammar) -> None:
    """With every value known the block is one forced string: nothing is drawn at all but what the caller left open."""
    known = {"bpm": "120", "duration": "30", "keyscale": "C major", "language": "en"}
    program = grammar.plan(known, max_duration=240, caption_tokens=0)
    job = Job(grammar.tokenizer.encode("hello"), None, [(program, 0)], SamplingParams())
    decoder.add(job)
    while decoder.jobs:
        decoder.step()
    assert job.steps == 1
    assert program.values["timesignature"] in ("2", "3", "4", "6")
