"""How many rows a matrix product needs so that a row's result does not depend on how many others stand beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.nn import functional as F

log = logging.getLogger(__name__)

_PROBED = 64


def invariant_rows(matrices: Sequence[torch.Tensor]) -> int | None:
    """The smallest row count from which all products with `matrices` (out, in) are equal bit for bit, or None if there is none.

    BLAS takes other kernels for a few rows than for many: with MKL they differ below four rows per thread. Padding small batches to this
    many rows makes a song's codes the same alone and in company.
    """
    probe = torch.Generator().manual_seed(0)
    smallest = 1
    for matrix in {tuple(m.shape): m for m in matrices}.values():
        x = torch.randn(_PROBED + 1, matrix.shape[1], generator=probe).to(matrix)
        reference = F.linear(x, matrix)
        equal = [all(_same(x, matrix, reference, at, n) for at in (0, 1)) for n in range(1, _PROBED + 1)]
        differing = [n for n, same in enumerate(equal, start=1) if not same]
        smallest = max(smallest, differing[-1] + 1 if differing else 1)
    if smallest > _PROBED // 2:
        log.warning("this machine's matrix products depend on the batch: codes may differ between batches in rare cases")
        return None
    return smallest


def _same(x: torch.Tensor, matrix: torch.Tensor, reference: torch.Tensor, at: int, n: int) -> bool:
    return torch.equal(F.linear(x[at : at + n], matrix), reference[at : at + n])
