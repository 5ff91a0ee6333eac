"""One evaluation of the DiT: equal to diffusers' forward where that is exact, and the same in every company."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from acestep.checkpoints.load import RendererComponents
from acestep.dit import attention
from acestep.dit.attention import (
    Attention,
    eager_attention,
    groups_heads,
    product_attention,
    sdpa_attention,
    varlen_agrees,
    window_layout,
)
from acestep.dit.denoiser import Denoiser, Row

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tiny", "tiny-xl"])
def parts(request: pytest.FixtureRequest, load_parts: Any) -> RendererComponents:
    return load_parts(request.param)


def inputs(parts: RendererComponents, frames: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = parts.transformer.config.audio_acoustic_hidden_dim
    width = parts.condition_encoder.config.hidden_size
    return (
        torch.randn(frames, channels, generator=generator),
        torch.randn(frames, 2 * channels, generator=generator),
        torch.randn(tokens, width, generator=generator),
    )


def theirs(parts: RendererComponents, x: Tensor, context: Tensor, condition: Tensor, t: float) -> Tensor:
    time = torch.tensor([t])
    with torch.no_grad():
        return parts.transformer(
            hidden_states=x[None], timestep=time, timestep_r=time, encoder_hidden_states=condition[None],
            context_latents=context[None], return_dict=False,
        )[0][0]  # fmt: skip


# 2.0 s in one block; 21 s with a dense window; 61 s in blocks of the window; odd lengths, whose last patch is half empty.
@pytest.mark.parametrize("frames", [50, 51, 525, 1526, 1539])
def test_equals_diffusers_alone(parts: RendererComponents, frames: int, rel: Any) -> None:
    x, context, condition = inputs(parts, frames, 40, seed=frames)
    denoiser = Denoiser(parts.transformer, CPU, torch.float32)
    row = Row(x, 0.7, context, denoiser.project(condition))
    assert rel(denoiser.velocity([row])[0], theirs(parts, x, context, condition, 0.7)) <= 1e-6


def test_rows_of_any_length_time_and_prompt_share_a_batch(parts: RendererComponents, rel: Any) -> None:
    denoiser = Denoiser(parts.transformer, CPU, torch.float32)
    shapes = [(50, 3, 1.0), (1701, 300, 0.25), (525, 40, 0.6), (51, 41, 0.01)]
    rows = []
    for n, (frames, tokens, t) in enumerate(shapes):
        x, context, condition = inputs(parts, frames, tokens, seed=n)
        rows.append(Row(x, t, context, denoiser.project(condition)))
    together = denoiser.velocity(rows)
    for row, got in zip(rows, together, strict=True):
        assert rel(got, denoiser.velocity([row])[0]) <= 1e-6


def test_a_poisoned_row_stays_alone(parts: RendererComponents) -> None:
    denoiser = Denoiser(parts.transformer, CPU, torch.float32)
    rows = []
    for n, frames in enumerate((600, 1400, 80)):
        x, context, condition = inputs(parts, frames, 20 + n, seed=n)
        rows.append(Row(x, 0.5, context, denoiser.project(condition)))
    rows[1].x[3, 0] = float("nan")
    first, second, third = denoiser.velocity(rows)
    assert first.isfinite().all()
    assert second.isnan().any()
    assert third.isfinite().all()


def test_the_null_condition_is_one_token(parts: RendererComponents, rel: Any) -> None:
    # diffusers repeats the learned embedding to the length of the prompt; equal keys give their common value either way.
    x, context, _ = inputs(parts, 100, 1, seed=1)
    null = parts.condition_encoder.null_condition_emb[0]
    denoiser = Denoiser(parts.transformer, CPU, torch.float32)
    got = denoiser.velocity([Row(x, 0.5, context, denoiser.project(null))])[0]
    assert rel(got, theirs(parts, x, context, null.expand(77, -1), 0.5)) <= 1e-6


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch.compile traces, run as traced: no code is generated, and "fullgraph" makes any break an error."""
    traced: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    compile = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda run, dynamic: compile(run, dynamic=dynamic, backend=backend, fullgraph=True)
    )
    return traced


def test_the_layer_compiles_whole_and_once_for_every_length(
    parts: RendererComponents, rel: Any, graphs: list[Any]
) -> None:
    plain = Denoiser(parts.transformer, CPU, torch.float32)
    compiled = Denoiser(parts.transformer, CPU, torch.float32, compile=True)
    compiled.warm_up()
    assert len(graphs) == 6  # three pieces, for one row and for several
    for shapes in ([(100, 40)], [(1400, 300)], [(51, 3), (700, 40)], [(250, 40)] * 3):
        mine, theirs = ([], [])
        for n, (frames, tokens) in enumerate(shapes):
            x, context, condition = inputs(parts, frames, tokens, seed=n)
            mine.append(Row(x, 0.5, context, compiled.project(condition)))
            theirs.append(Row(x, 0.5, context, plain.project(condition)))
        for got, want in zip(compiled.velocity(mine), plain.velocity(theirs), strict=True):
            assert rel(got, want) <= 1e-6
    assert len(graphs) == 6


def test_what_would_compile_anew_runs_as_written(parts: RendererComponents, graphs: list[Any]) -> None:
    denoiser = Denoiser(parts.transformer, CPU, torch.bfloat16, compile=True)
    denoiser.set_precision(torch.float32)
    x, context, condition = inputs(parts, 50, 5, seed=1)
    denoiser.velocity([Row(x, 0.5, context, denoiser.project(condition))])
    assert not graphs


@pytest.mark.parametrize("kernel", [eager_attention, product_attention])
@pytest.mark.parametrize("mask", [None, "keys", "pairs", "pairs of each row"])
def test_written_out_equals_fused(kernel: Any, mask: str | None, rel: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1500, 2, 4, 16, generator=generator).permute(1, 2, 0, 3)  # as the projections leave them
    k, v = (torch.randn(2, 2, 90, 16, generator=generator) for _ in range(2))
    shape = {"keys": (2, 1, 1, 90), "pairs": (1, 1, 1500, 90), "pairs of each row": (2, 1, 1500, 90)}
    hidden = None
    if mask is not None:
        hidden = torch.zeros(shape[mask]).masked_fill(torch.rand(shape[mask], generator=generator) > 0.6, -1e4)
    with torch.inference_mode():
        assert rel(kernel(q, k, v, hidden), sdpa_attention(q, k, v, hidden)) <= 1e-6


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "grouped"),
    [
        ("cpu", torch.float32, None, True),
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", torch.float16, (12, 0), True),
        ("cuda", torch.float32, (9, 0), False),
        ("cuda", torch.float16, (7, 5), False),  # T4, RTX 20
        ("cuda", torch.float16, (7, 0), False),  # V100
        ("cuda", torch.float16, (6, 1), False),
        ("cuda", torch.bfloat16, None, False),  # ROCm
        ("mps", torch.float16, None, False),
    ],
)
def test_heads_are_grouped_only_where_a_fused_kernel_does_it(
    device: str, dtype: torch.dtype, capability: tuple[int, int] | None, grouped: bool
) -> None:
    assert groups_heads(device, dtype, capability) is grouped


@pytest.mark.parametrize("mask", [False, True])
def test_heads_that_no_kernel_groups_are_repeated(mask: bool, monkeypatch: pytest.MonkeyPatch, rel: Any) -> None:
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    hidden = torch.zeros(2, 1, 1, 30).masked_fill(torch.arange(30) > 20, -1e4) if mask else None
    expected = sdpa_attention(q, k, v, hidden)
    fused, seen = torch.nn.functional.scaled_dot_product_attention, []

    def count(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append((k.shape[1], options["enable_gqa"]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(attention, "groups_heads", lambda *_: False)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    assert rel(sdpa_attention(q, k, v, hidden), expected) <= 1e-6
    assert seen == [(4, False)]


def test_half_precision_softmax_does_not_overflow() -> None:
    # Scores beyond 65504 are infinite in float16; the float32 softmax of the eager kernel is not impressed.
    q = torch.full((1, 1, 4, 16), 200.0, dtype=torch.float16)
    k = torch.full((1, 1, 4, 16), 200.0, dtype=torch.float16)
    v = torch.ones((1, 1, 4, 16), dtype=torch.float16)
    assert torch.equal(eager_attention(q, k, v, None), v)


def test_sliding_layers_never_hold_all_scores() -> None:
    width, window = 7500, 128
    layout = window_layout([width], width, window, CPU, torch.float32)
    assert layout.mask is not None
    assert layout.mask.numel() < width * 5 * window


def test_an_unusable_backend_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    attention = Attention("flash", CPU, torch.float32)
    assert attention.backend == "sdpa"
    assert "flash attention needs CUDA" in caplog.text


def test_the_flash_kernel_of_the_hub_is_named_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    # Newer releases of `kernels` refuse to load what has neither version nor revision.
    def get_kernel(repository: str, *, version: int) -> Any:
        return SimpleNamespace(flash_attn_func=(repository, version))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    attention = Attention("flash", torch.device("cuda"), torch.bfloat16)
    assert attention.backend == "flash"
    assert attention._flash == ("kernels-community/flash-attn2", 4)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """What flash-attn says that its function of this name computes: `[B, S, H, D]`, fewer heads of keys, a window to both sides."""
    at, reach = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1]), window_size
    seen = torch.ones_like(at, dtype=torch.bool) if reach == (-1, -1) else (at <= reach[0]) & (-at <= reach[1])
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What PyTorch says that its function of this name computes: sequences one after another, each for itself."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or q.shape[1] == k.shape[1]
    out = torch.full_like(q, torch.nan)
    for (a, b), (c, d) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        out[a:b] = flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], window_size)[0] if d > c else 0.0
    return out


def test_rows_of_different_lengths_need_no_masks(
    parts: RendererComponents, monkeypatch: pytest.MonkeyPatch, rel: Any
) -> None:
    masked = Denoiser(parts.transformer, CPU, torch.float32)
    monkeypatch.setattr(attention, "_load_varlen", lambda device, dtype: varlen_attn)
    denoiser = Denoiser(parts.transformer, CPU, torch.float32)
    rows = []
    for n, (frames, tokens) in enumerate([(50, 3), (1701, 300), (525, 300), (51, 1)]):
        x, context, condition = inputs(parts, frames, tokens, seed=n)
        rows.append(Row(x, 0.5, context, denoiser.project(condition)))
    for some in (rows, rows[:2], rows[1:2], rows[:1] * 2):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "window_layout", None)
            got = denoiser.velocity(some)
        for velocity, row in zip(got, some, strict=True):
            assert rel(velocity, masked.velocity([row])[0]) <= 3e-6


@pytest.mark.parametrize("wrong", ["rows", "windows", None])
def test_a_card_has_to_show_that_it_needs_no_masks(wrong: str | None) -> None:
    def answer(q: Tensor, k: Tensor, v: Tensor, *where: Any, window_size: tuple[int, int], **how: Any) -> Tensor:
        if wrong == "windows":
            window_size = (-1, -1)
        out = varlen_attn(q, k, v, *where, window_size=window_size, **how)
        return out + 1.0 if wrong == "rows" else out

    assert varlen_agrees(answer, CPU, torch.float32) is (wrong is None)


@pytest.mark.parametrize("frames", [[50], [1526], [1526, 1526], [700, 1526]])
def test_flash_attention_is_asked_for_the_same(parts: RendererComponents, frames: list[int], rel: Any) -> None:
    """Its layout, its windows, and that rows with padding, which it cannot hide, take the masked way."""
    plain, flash = (Denoiser(parts.transformer, CPU, torch.float32) for _ in range(2))
    calls: list[tuple[int, int]] = []

    def counted(*states: Tensor, window_size: tuple[int, int]) -> Tensor:
        calls.append(window_size)
        return flash_attn_func(*states, window_size=window_size)

    flash.attention._flash = counted
    made = [inputs(parts, n, 20, seed=i) for i, n in enumerate(frames)]
    mine, theirs = (
        [Row(x, 0.5, context, denoiser.project(condition)) for x, context, condition in made]
        for denoiser in (flash, plain)
    )
    for got, want in zip(flash.velocity(mine), plain.velocity(theirs), strict=True):
        assert rel(got, want) <= 1e-6
    kinds = parts.transformer.layer_types
    sliding, ragged = kinds.count("sliding_attention"), len({*frames}) > 1
    window = int(parts.transformer.config.sliding_window)
    assert calls.count((window, window)) == (0 if ragged else sliding)
    assert calls.count((-1, -1)) == len(kinds) + (0 if ragged else len(kinds) - sliding)


def test_flash_attention_that_fails_is_left_for_good(parts: RendererComponents, caplog: Any, rel: Any) -> None:
    denoiser = Denoiser(parts.transformer, CPU, torch.float32)
    x, context, condition = inputs(parts, 1526, 20, seed=1)
    row = Row(x, 0.5, context, denoiser.project(condition))
    want = denoiser.velocity([row])[0]

    def broken(*states: Tensor, window_size: tuple[int, int]) -> Tensor:
        raise RuntimeError("no kernel image is available")

    denoiser.attention._flash, denoiser.attention.backend = broken, "flash"
    assert rel(denoiser.velocity([row])[0], want) <= 1e-6
    assert denoiser.attention.backend == "sdpa"
    assert caplog.text.count("flash attention failed") == 1
