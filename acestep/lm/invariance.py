"""How many rows a matrix product needs so that a row's result does not depend on how many others stand beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.nn import functional as F

log = logging.getLogger(__name__)

_COUNTS = (64, 48, 33, *range(32, 0, -1))  # row counts to try, falling
_WIDEST = 16_384  # rows of a matrix that are tried: a vocabulary's worth would take seconds


def invariant_rows(matrices: Sequence[torch.Tensor]) -> int | None:
    """The smallest row count from which all products with `matrices` (out, in) are equal bit for bit, or None if there is none.

    BLAS takes other kernels for a few rows than for many: with MKL they differ below four to six rows per thread. Padding small batches
    to this many rows makes a song's codes the same alone and in company.
    """
    smallest = 1
    for matrix in {tuple(m.shape): m[:_WIDEST] for m in matrices}.values():
        x = torch.randn(_COUNTS[0] + 1, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
        reference = F.linear(x, matrix)
        for n in _COUNTS:
            if n < smallest:
                break
            at = n % 2  # also from a place that is not the first
            if not torch.equal(F.linear(x[at : at + n], matrix), reference[at : at + n]):
                smallest = n + 1
                break
    if smallest > _COUNTS[3]:
        log.warning(
            "this machine's matrix products depend on the batch: codes may differ between batches in rare cases"
        )
        return None
    return smallest
