"""Tiles equal the whole, and folding changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from acestep.checkpoints.load import RendererComponents
from acestep.checkpoints.modules import AutoencoderOobleck
from acestep.checkpoints.tiny import LATENT_CHANNELS
from acestep.dit.vae import Vae
from acestep.dit.vae_layers import FoldedSnake, fold
from acestep.errors import OutOfMemory

CPU = torch.device("cpu")
Fresh = Callable[[], AutoencoderOobleck]


@pytest.fixture
def fresh(load_parts: Callable[[str], RendererComponents]) -> Fresh:
    """A tiny VAE as it is loaded; `Vae` changes what it is given."""
    return lambda: load_parts("tiny").vae


def drained(encoding: Any) -> torch.Tensor:
    while True:
        try:
            next(encoding)
        except StopIteration as done:
            return done.value


def latents_of(frames: int) -> torch.Tensor:
    return torch.randn(frames, LATENT_CHANNELS, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)


@pytest.mark.parametrize("device", ["cpu", "xpu"])  # in both layouts: only the layout depends on the device
def test_folding_changes_nothing(fresh: Fresh, rel: Any, device: str) -> None:
    vae = fresh()
    latents = latents_of(40).float().T[None]
    audio = torch.randn(1, 2, 12 * 1920, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, encoded = vae.decode(latents).sample, vae.encode(audio).latent_dist.mode()
        fold(vae, torch.device(device))
        fold(vae, torch.device(device))
        assert rel(vae.decode(latents).sample, before) <= 1e-6
        assert rel(vae.encode(audio).latent_dist.mode(), encoded) <= 1e-5
    assert not any(hasattr(module, "weight_g") for module in vae.modules())
    assert any(isinstance(module, FoldedSnake) for module in vae.modules())


def test_channels_stay_together_through_the_whole_network(fresh: Fresh) -> None:
    """No layer hands over another layout, which the next one would reorder; and none keeps its weights in another."""
    vae = fresh()
    fold(vae, CPU)
    apart: list[str] = []

    def look(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.is_contiguous(memory_format=torch.channels_last):
                apart.append(name)

        return hook

    layers = [(n, m) for n, m in vae.named_modules() if not [*m.children()]]
    for name, module in layers:
        module.register_forward_hook(look(name))
    with torch.no_grad():
        vae.encode(torch.randn(1, 2, 4 * 1920))
        vae.decode(torch.randn(1, LATENT_CHANNELS, 6))
    assert not apart
    weights = [m.weight for _, m in layers if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize("tile", [60, 256])
def test_decoded_tiles_equal_the_whole(fresh: Fresh, tile: int, rel: Any) -> None:
    vae = Vae(fresh().double(), CPU, tile=tile, overlap=9)
    latents = latents_of(301)
    with torch.no_grad():
        whole = vae.vae.decode(latents.T[None]).sample[0].float()
    pieces = list(vae.decode(latents))
    assert [begin * vae.hop for begin, _ in pieces] == [
        sum(piece.shape[1] for _, piece in pieces[:n]) for n in range(len(pieces))
    ]
    assert all(piece.shape[1] <= tile * vae.hop for _, piece in pieces)
    assert rel(torch.cat([piece for _, piece in pieces], dim=1), whole) <= 1e-7
    # 9 frames are needed: with 6 the tiles differ from the whole, so this test would notice.
    short = Vae(vae.vae, CPU, tile=tile, overlap=6)
    assert rel(torch.cat([piece for _, piece in short.decode(latents)], dim=1), whole) > 1e-7


def test_context_is_dropped_where_nothing_needs_it(fresh: Fresh) -> None:
    """The fast layers, which take the time, compute hardly more than the tile itself."""
    vae = Vae(fresh(), CPU, tile=60, overlap=9)
    seen: list[float] = []
    for block in vae.vae.decoder.block[1:]:
        up = block.conv_t1
        up.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    latents = latents_of(200).float()
    pieces = vae.decode(latents)
    next(pieces)
    seen.clear()
    next(pieces)
    frames = [width / rate for width, rate in zip(seen, (10, 60, 240, 960), strict=True)]
    assert all(42 < width < 42 + 2 * 1.1 for width in frames), frames


def test_the_first_piece_is_short(fresh: Fresh) -> None:
    vae = Vae(fresh(), CPU)
    _, piece = next(iter(vae.decode(latents_of(500).float())))
    assert piece.shape == (2, 64 * 1920)
    assert vae.tiles == 1


def test_encoded_tiles_equal_the_whole(fresh: Fresh, rel: Any) -> None:
    vae = Vae(fresh().double(), CPU, tile=36)
    audio = torch.randn(2, 70 * 1920, generator=torch.Generator().manual_seed(0)) * 0.2
    with torch.no_grad():
        whole = vae.vae.encode(audio[None].double()).latent_dist.mode()[0].T.float()
    assert rel(drained(vae.encode(audio)), whole) <= 1e-6
    assert vae.tiles == 4


def test_encoding_draws_nothing(fresh: Fresh) -> None:
    vae = Vae(fresh(), CPU)
    audio = torch.randn(2, 20 * 1920, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = drained(vae.encode(audio))
    torch.manual_seed(2)
    assert torch.equal(drained(vae.encode(audio)), first)


def test_audio_that_ends_within_a_frame(fresh: Fresh) -> None:
    vae = Vae(fresh(), CPU)
    assert len(drained(vae.encode(torch.zeros(2, 5 * 1920 + 1)))) == 6


def test_activations_compile_once_for_every_length(fresh: Fresh, rel: Any, monkeypatch: Any) -> None:
    graphs: list[Any] = []
    compile = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile",
        lambda run, dynamic: compile(run, dynamic=dynamic, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]),
    )  # fmt: skip
    latents = latents_of(301).float()
    plain, compiled = Vae(fresh(), CPU), Vae(fresh(), CPU, compile=True)
    compiled.warm_up()
    assert len(graphs) == 1
    for part in (latents, latents[:70]):
        got, want = (torch.cat([piece for _, piece in vae.decode(part)], dim=1) for vae in (compiled, plain))
        assert rel(got, want) <= 1e-6
    assert len(graphs) == 1


def test_a_vae_in_its_own_precision(fresh: Fresh) -> None:
    # diffusers hands latents over as they are and fails where VAE and DiT differ.
    vae = Vae(fresh(), CPU)
    _, piece = next(iter(vae.decode(latents_of(10).bfloat16())))
    assert piece.dtype == torch.float32


def test_a_tile_that_overflows_is_decoded_in_float32(fresh: Fresh, rel: Any) -> None:
    latents = latents_of(20).float()
    exact = next(iter(Vae(fresh(), CPU).decode(latents)))[1]
    half = Vae(fresh().bfloat16(), CPU)
    overflow = half.vae.decoder.conv1.register_forward_hook(
        lambda module, args, out: out * float("inf") if out.dtype == torch.bfloat16 else out
    )
    assert rel(next(iter(half.decode(latents)))[1], exact) < 0.02
    overflow.remove()
    assert half.dtype == torch.bfloat16


def test_a_tile_that_overflows_is_encoded_in_float32(fresh: Fresh, rel: Any) -> None:
    audio = torch.randn((2, 20 * 1920), generator=torch.Generator().manual_seed(1)) * 0.1
    exact = drained(Vae(fresh(), CPU).encode(audio))
    half = Vae(fresh().bfloat16(), CPU)
    overflow = half.vae.encoder.conv1.register_forward_hook(
        lambda module, args, out: out * float("inf") if out.dtype == torch.bfloat16 else out
    )
    assert rel(drained(half.encode(audio)), exact) < 0.02
    overflow.remove()
    assert {p.dtype for p in half.vae.parameters()} == {torch.bfloat16}


class _SmallCard(torch.nn.Module):
    """A decoder that has no room for more than `room` frames."""

    def __init__(self, decoder: torch.nn.Module, room: int) -> None:
        super().__init__()
        self.decoder, self.room = decoder, room

    def forward(self, latents: torch.Tensor, **context: int) -> torch.Tensor:
        if latents.shape[-1] > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.decoder(latents, **context)


def test_tiles_shrink_until_they_fit(fresh: Fresh, rel: Any) -> None:
    latents = latents_of(200).float()
    plain = Vae(fresh(), CPU)
    whole = torch.cat([piece for _, piece in plain.decode(latents)], dim=1)
    plain.vae.decoder = _SmallCard(plain.vae.decoder, room=60)
    tight = Vae(plain.vae, CPU)
    assert rel(torch.cat([piece for _, piece in tight.decode(latents)], dim=1), whole) <= 1e-6
    plain.vae.decoder.room = 10
    with pytest.raises(OutOfMemory, match="MiB needed"):
        list(tight.decode(latents))
