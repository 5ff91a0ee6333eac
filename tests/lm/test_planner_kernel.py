"""The Triton kernel: on a card as it is, elsewhere by Triton's interpreter where Triton is installed (it comes with torch for CUDA)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from acestep.lm.attention import check_kernel, decode_kernel
from acestep.lm.decode_kernel import decode_attention, supports
from acestep.lm.model import ModelConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(64, 64, 1, heads, kv_heads, head_dim, 100, 1e6, 1e-6, True, 1_000)


@pytest.mark.parametrize("sizes", [(4, 2, 16), (16, 8, 128), (32, 8, 128), (4, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_agrees_with_plain_attention(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert supports(*sizes)
    assert check_kernel(decode_attention, config(*sizes), DEVICE, dtype)


def test_a_wrong_kernel_is_found_out() -> None:
    def wrong(q: torch.Tensor, *rest: object) -> torch.Tensor:
        return decode_attention(q, *rest) + 0.1  # type: ignore[arg-type]

    assert not check_kernel(wrong, config(4, 2, 16), DEVICE, torch.float32)


def test_sizes_that_it_cannot_index_are_refused() -> None:
    assert not supports(40, 8, 128)
    assert not supports(16, 8, 96)
    assert decode_kernel(config(4, 2, 16), torch.device("cpu"), torch.float32) is None
