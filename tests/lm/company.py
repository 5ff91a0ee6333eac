"""A job among others in one batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from acestep.lm.decoder import Decoder
from acestep.lm.job import Job


def written_among(decoder: Decoder, job: Job, others: Iterable[Job]) -> tuple[list[int], torch.Tensor]:
    """What a job writes, and the hidden states that each token was drawn from. Of the others come as many before it as leave room."""
    states = []
    draw = decoder._draw

    def spy(due: list, hidden: torch.Tensor) -> None:
        states.extend(hidden[row.hidden].clone() for output in due if output in job.outputs for row in output.rows)
        draw(due, hidden)

    decoder._draw = spy  # type: ignore[method-assign]
    for number, other in enumerate(others):
        if decoder.fits(other) and decoder.max_rows - decoder.rows_used - other.rows >= job.rows:
            decoder.add(other)
        if number % 2:
            decoder.step()
    decoder.add(job)
    while not job.done:
        decoder.step()
    decoder.reset()
    decoder._draw = draw  # type: ignore[method-assign]
    return job.outputs[0].written, torch.stack(states)
