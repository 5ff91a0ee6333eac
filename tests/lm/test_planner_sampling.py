"""The two-stage draw: the right distribution, the right support, noise that depends on seed and counter alone."""

from __future__ import annotations

import math

import pytest
import torch
from drawing import sample

from acestep.lm.sampling import _mass, gumbel, keys, penalise

WIDTHS = [3, 256, 1_000, 2_049]


def draws(
    logits: torch.Tensor, count: int, *, top_k: int = 0, top_p: float = 1.0, greedy: bool = False
) -> torch.Tensor:
    """Many draws from one row of logits, by seeds 0, 1, 2 …"""
    rows = logits.expand(count, -1).clone()
    zeros = torch.zeros(count, dtype=torch.long)
    return sample(
        rows, torch.arange(count), zeros, zeros + top_k, torch.full((count,), top_p), torch.full((count,), greedy)
    )


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard deviations from the mean of the statistic; tokens that are hardly expected count as one."""
    rare = expected < 5
    o = torch.cat((observed[~rare], observed[rare].sum()[None]))
    e = torch.cat((expected[~rare], expected[rare].sum()[None]))
    o, e = o[e > 0], e[e > 0]
    freedom = max(len(e) - 1, 1)
    return float((((o - e) ** 2 / e).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_come_as_often_as_softmax_says(width: int) -> None:
    logits = torch.randn(width, generator=torch.Generator().manual_seed(width)) * 2
    count = 8_000
    observed = torch.bincount(draws(logits, count), minlength=width).double()
    assert abs(chi_square(observed, logits.double().softmax(0) * count)) < 5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_and_renormalises(width: int, top_p: float) -> None:
    logits = torch.randn(width, generator=torch.Generator().manual_seed(width + 1)) * 2
    p = logits.double().softmax(0)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
    nucleus = torch.zeros_like(p)
    nucleus[kept] = p[kept] / p[kept].sum()
    observed = torch.bincount(draws(logits, 6_000, top_p=top_p), minlength=width).double()
    assert observed[nucleus == 0].sum() == 0
    assert abs(chi_square(observed, nucleus * 6_000)) < 5


@pytest.mark.parametrize("top_p", [1e-50, 1e-10])
def test_the_smallest_nucleus_is_the_best_token(top_p: float) -> None:
    logits = torch.randn(2_000, generator=torch.Generator().manual_seed(1))
    assert set(draws(logits, 20, top_p=top_p).tolist()) == {int(logits.argmax())}


def test_top_k_comes_before_top_p() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0] + [-torch.inf] * 300)
    assert set(draws(logits, 3_000, top_k=3).tolist()) == {0, 1, 2}
    # Of the three that top-k leaves, two hold 0.91 of the mass; of all five they hold 0.86.
    assert set(draws(logits, 3_000, top_k=3, top_p=0.9).tolist()) == {0, 1}
    assert set(draws(logits, 3_000, top_p=0.9).tolist()) == {0, 1, 2}


def test_greedy_rows_beside_drawn_rows() -> None:
    logits = torch.randn(4, 600, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1)
    greedy = torch.tensor([True, False, True, False])
    zeros = torch.zeros(4, dtype=torch.long)
    drawn = sample(logits.clone(), torch.arange(4), zeros, zeros, torch.ones(4), greedy)
    assert torch.equal(drawn[greedy], best[greedy])
    assert not torch.equal(drawn, best)


def test_what_is_masked_never_comes() -> None:
    logits = torch.full((700,), -torch.inf)
    logits[[5, 300, 699]] = torch.tensor([0.0, 1.0, 2.0])
    assert set(draws(logits, 500).tolist()) == {5, 300, 699}


def test_a_row_is_drawn_alike_alone_and_in_company() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(9, 2_000, generator=generator)
    seeds, steps = torch.arange(9) * 77, torch.arange(9) % 4
    top_p = torch.tensor([0.9, 1.0, 0.2] * 3)
    top_k = torch.tensor([0, 0, 0, 0, 50, 0, 0, 0, 0])
    never = torch.zeros(9, dtype=torch.bool)
    together = sample(logits.clone(), seeds, steps, top_k, top_p, never)
    for row in range(9):
        one = slice(row, row + 1)
        alone = sample(logits[one].clone(), seeds[one], steps[one], top_k[one], top_p[one], never[one])
        assert alone == together[row]


def test_the_mass_of_a_row_does_not_depend_on_company_or_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for seed in range(20):
            p = torch.softmax(torch.randn(3, 64_000, generator=torch.Generator().manual_seed(seed)), -1)
            assert torch.equal(_mass(p)[1:2], _mass(p[1:2]))
    finally:
        torch.set_num_threads(threads)


def test_noise_is_a_function_of_seed_and_counter() -> None:
    lanes = torch.arange(600)
    key = keys(torch.tensor([1, 2**63 - 1, 1]), torch.tensor([0, 0, 1]))
    noise = gumbel(key, lanes)
    assert torch.equal(noise[:1, :50], gumbel(key[:1], lanes[:50]))
    assert len({tuple(row.tolist()) for row in noise}) == 3
    # Of the two-to-the-17th lanes of many keys, mean and variance of a Gumbel variable.
    many = gumbel(keys(torch.arange(256), torch.zeros(256, dtype=torch.long)), torch.arange(512)).double()
    assert abs(many.mean() - 0.5772) < 0.02
    assert abs(many.var() - math.pi**2 / 6) < 0.05
    centred = many - many.mean()
    assert abs((centred[1:] * centred[:-1]).mean()) < 0.02
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 0.02


def test_the_penalty_weakens_both_signs() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    penalise(logits, torch.tensor([0, 1]), 2.0)
    assert logits.tolist() == [1.0, -4.0, 1.0]
