"""What the planner reads of its card in a step."""

from __future__ import annotations

from acestep.lm.decoder import Decoder
from acestep.lm.grammar import CodesProgram, Grammar, OpenProgram
from acestep.lm.job import Job
from acestep.lm.sampling import SamplingParams
from tests.waiting import Waits


def test_tokens_of_all_songs_are_read_at_once(either_decoder: Decoder, grammar: Grammar) -> None:
    t = grammar.tokenizer
    params = SamplingParams(temperature=1.0, cfg_scale=2.0)
    either_decoder.add(Job([1, 2, 3], [4, 5], [(CodesProgram(t, 8, limit=8), 1)], params))
    either_decoder.add(Job([6, 7], None, [(CodesProgram(t, None, limit=8), 2)], SamplingParams()))
    either_decoder.add(Job([8], None, [(OpenProgram([t.eos, t.pad], limit=8), 3)], SamplingParams()))
    steps = 0
    while either_decoder.busy:
        with Waits() as waits:
            either_decoder.step()
        assert waits.found.count("tolist") == 1
        assert not {"item", "tensor", "cpu", "nonzero", "__getitem__"} & {*waits.found}
        steps += 1
    assert steps >= 8
