"""float16, as on cards without bfloat16: weights that overflow where the published ones do, from a checkpoint on disk to a song."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from acestep.checkpoints import Checkpoint
from acestep.dit.precision import in_float32
from acestep.dit.renderer import Renderer
from acestep.dit.work import Rendered, RenderWork
from acestep.errors import InvalidOutput
from acestep.request import SongRequest
from acestep.stage_settings import RendererSettings

Load = Callable[..., Renderer]


def scaled(component: str, layer: str, **factors: float) -> tuple[str, dict[str, float]]:
    return component, {f"{layer}{name}.weight": factor for name, factor in factors.items()}


# Where a part overflows: its last feed-forward layer, whose product in the published lyric encoder reaches 505,000. The largest
# number of float16 is 65,504; no weight is beyond it.
FORWARD = {"up_proj": 100.0, "down_proj": 10_000.0}
LYRICS = scaled("condition_encoder", "lyric_encoder.layers.1.mlp.", **FORWARD)
TIMBRE = scaled("condition_encoder", "timbre_encoder.layers.1.mlp.", **FORWARD)
TEXT = scaled("text_encoder", "layers.1.mlp.", **FORWARD)
TOKENIZER = scaled("audio_tokenizer", "attention_pooler.layers.1.mlp.", **FORWARD)
DETOKENIZER = scaled("audio_token_detokenizer", "layers.1.mlp.", **FORWARD)
VALUES = scaled("transformer", "", **{"condition_embedder": 300.0, "layers.1.cross_attn.to_v": 10_000.0})
Scaled = tuple[str, dict[str, float]]


@pytest.fixture(scope="module")
def load(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """A renderer of the tiny checkpoint with some weights scaled, loaded as any other."""
    made: list[Renderer] = []

    def from_disk(dtype: str, *parts: Scaled) -> Renderer:
        checkpoint = checkpoints["tiny"]
        folder = tmp_path_factory.mktemp("scaled") / "tiny"
        shutil.copytree(checkpoint.path, folder)
        for component, factors in parts:
            (path,) = (folder / component).glob("*.safetensors")
            state = load_file(path)
            for name, factor in factors.items():
                state[name] *= factor
            path.unlink()  # a link to what other checkpoints share
            save_file(state, path, metadata={"format": "pt"})
        checkpoint = replace(checkpoint, path=folder)
        made.append(Renderer.load(checkpoint, RendererSettings(dtype=dtype)))  # type: ignore[arg-type]
        return made[-1]

    yield from_disk
    for renderer in made:
        renderer.close()


def render(renderer: Renderer, source: Path | None = None, reference: Path | None = None, **fields: Any) -> Rendered:
    fields = {"prompt": "p", "lyrics": "[Verse]\nla la la", "seed": 1, "steps": 2, **fields}
    if source is None:
        fields.setdefault("duration", 10)
    request = SongRequest(
        src_audio=str(source) if source else None, reference_audio=(str(reference),) if reference else (), **fields
    )
    work = RenderWork(request, src_audio=source, reference_audio=(reference,) if reference else ())
    return renderer.submit(work).result(60)


@pytest.mark.parametrize("part", [LYRICS, TIMBRE, TEXT], ids=["lyrics", "timbre", "text"])
def test_a_song_equals_that_of_float32(load: Load, rel: Any, part: Scaled) -> None:
    half, whole = load("float16", part), load("float32", part)
    audio = render(half).items[0].audio
    assert half.stats()["float32_retries"] == 0  # the DiT never saw what is no number
    assert rel(audio, render(whole).items[0].audio) < 0.02


@pytest.mark.parametrize("part", [TOKENIZER, DETOKENIZER], ids=["tokenizer", "detokenizer"])
def test_a_cover_equals_that_of_float32(load: Load, song_file: Callable[..., Path], rel: Any, part: Scaled) -> None:
    half, whole = load("float16", part), load("float32", part)
    source = song_file(4.0)
    audio = render(half, source, task="cover").items[0].audio
    assert rel(audio, render(whole, source, task="cover").items[0].audio) < 0.02
    same = [
        a == b for a, b in zip(half.submit_codes(source).result(), whole.submit_codes(source).result(), strict=True)
    ]
    assert sum(same) >= 0.9 * len(same)  # a number on the border between two codes may fall to either side


def test_each_of_them_overflows_in_float16_itself(load: Load) -> None:
    parts: Any = load("float16", LYRICS, TIMBRE, TEXT, TOKENIZER, DETOKENIZER)._preparation._conditions._parts
    ids, ones = torch.arange(20)[None], torch.ones((1, 20), dtype=torch.bool)
    latents = torch.randn((1, 20, 8), generator=torch.Generator().manual_seed(1))

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        x = latents.to(dtype)
        words = parts.text_encoder.get_input_embeddings()(ids).to(dtype)
        quantized, _ = parts.audio_tokenizer.tokenize(x)
        return [
            parts.condition_encoder.lyric_encoder(inputs_embeds=words, attention_mask=ones),
            parts.condition_encoder.timbre_encoder(x, torch.zeros(1, dtype=torch.long))[0],
            parts.text_encoder(input_ids=ids).last_hidden_state,
            quantized,
            parts.audio_token_detokenizer(torch.ones((1, 4, 32), dtype=dtype)),
        ]

    with torch.inference_mode():
        assert [bool(out.isfinite().all()) for out in run(torch.float16)] == [False] * 5
        with in_float32(*(m for m in vars(parts).values() if isinstance(m, torch.nn.Module))):
            assert [bool(out.isfinite().all()) for out in run(torch.float32)] == [True] * 5


def test_keys_and_values_are_projected_again_for_the_second_try(load: Load, rel: Any) -> None:
    half, whole = (load(dtype, VALUES) for dtype in ("float16", "float32"))
    audio = render(half).items[0].audio
    assert half.stats()["float32_retries"] == 1
    assert rel(audio, render(whole).items[0].audio) < 0.02


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_no_number_fails_the_song_and_is_not_kept(load: Load, dtype: str) -> None:
    renderer = load(dtype)
    conditions: Any = renderer._preparation._conditions
    broken = conditions._parts.condition_encoder.lyric_encoder.layers[0].mlp.down_proj.weight
    sound = broken.data.clone()
    broken.data.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(InvalidOutput, match="lyrics"):
            render(renderer)
    broken.data.copy_(sound)
    assert render(renderer).items[0].audio.isfinite().all()


def test_weights_stay_narrow_whatever_happens(load: Load) -> None:
    module: Any = load("float16")._preparation._conditions._parts.condition_encoder
    before = {name: (value.dtype, value.clone()) for name, value in module.state_dict().items()}

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    handle = module.lyric_encoder.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError), in_float32(module), torch.inference_mode():
        module.lyric_encoder(inputs_embeds=torch.ones(1, 3, 32), attention_mask=torch.ones((1, 3), dtype=torch.bool))
    handle.remove()
    assert all(value.dtype == before[name][0] for name, value in module.state_dict().items())
    assert all(torch.equal(value, before[name][1]) for name, value in module.state_dict().items())
