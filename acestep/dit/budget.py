"""How many frames may share a denoising step, so that batches form only where they pay."""

from __future__ import annotations

import math

import torch

from acestep.sizing import profiles
from acestep.sizing.ledger import PASS_FRAMES

_FRAMES_PER_TOKEN = 2


def batch_frames(device: torch.device, model: str) -> int:
    """Rows times frames up to which a step of `model` gets cheaper per song by taking in more.

    Two things make it so: launching the kernels takes the same time however small the work is, and so does reading the weights. Past
    the larger of both limits a batch only makes its songs wait for each other. 0 on a CPU, which gains nothing; and without batches a
    song is the same there bit for bit whatever runs beside it.
    """
    if device.type == "cpu":
        return 0
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return card_frames(card, model)


def card_frames(card: str, model: str) -> int:
    """As `batch_frames`, by the name that the card's driver gives."""
    cost = profiles.find(card).renderer(model)
    launch_bound = cost.floor_s / cost.frame_s
    known = profiles.identify(card) if card else None
    # A token costs 2 FLOP per parameter, and reading a parameter of 2 bytes takes its share of the bandwidth.
    weight_bound = _FRAMES_PER_TOKEN * known.tflops * 1e3 / known.gb_per_s if known is not None else 0.0
    return min(PASS_FRAMES, math.ceil(max(launch_bound, weight_bound)))
