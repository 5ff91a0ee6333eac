"""Batches form where they pay: long before a card is full, and never on a CPU."""

from __future__ import annotations

import pytest
import torch

from acestep.dit.budget import batch_frames, card_frames
from acestep.sizing.ledger import PASS_FRAMES

CLIP = 250  # frames of 10 s


def test_a_cpu_takes_one_at_a_time() -> None:
    assert batch_frames(torch.device("cpu"), "acestep-v15-turbo") == 0


# The compute-bound points of the published cards: 24 s of audio on an H100, 13 s on a 4090, 6 s on a 3060.
@pytest.mark.parametrize(
    ("card", "least"),
    [("NVIDIA H100 80GB HBM3", 24), ("NVIDIA GeForce RTX 4090", 13), ("NVIDIA GeForce RTX 3060", 5)],
)
def test_at_least_what_reading_the_weights_takes(card: str, least: float) -> None:
    assert card_frames(card, "acestep-v15-turbo") >= 25 * least * 0.95


def test_fast_cards_share_steps_among_clips_and_slow_ones_do_not() -> None:
    assert card_frames("NVIDIA H100 80GB HBM3", "acestep-v15-turbo") >= 6 * CLIP
    assert card_frames("NVIDIA GeForce RTX 3060", "acestep-v15-turbo") < 2 * CLIP
    assert card_frames("NVIDIA H100 80GB HBM3", "acestep-v15-xl-turbo") < card_frames(
        "NVIDIA H100", "acestep-v15-turbo"
    )
    assert 0 < card_frames("A card of tomorrow", "acestep-v15-turbo") <= PASS_FRAMES
