"""The tiny checkpoints are deterministic, small, and loaded as real ones are."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_weights

from acestep.checkpoints import prepare, resolve
from acestep.checkpoints.load import load_renderer
from acestep.checkpoints.modules import component_class
from acestep.checkpoints.tiny import write_tiny
from acestep.errors import ModelMissing

RENDERERS = ("tiny", "tiny-base", "tiny-xl")


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_the_same_bytes_each_time_and_few_of_them(home, tmp_path):
    write_tiny(tmp_path)
    assert digest(tmp_path) == digest(home)
    files = {path.stat().st_ino: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert sum(files.values()) < 12_000_000


def test_others_may_read_what_the_umask_allows(home):
    folder = resolve(str(home / "tiny"), "renderer", root=home).path
    mode = (folder / "model_index.json").stat().st_mode
    for place in (folder / "transformer", folder / "text_encoder", home / "tiny", home / "vae", home / "tiny-lm"):
        assert [path.stat().st_mode for path in place.glob("*.safetensors")] == [mode]


def test_a_newer_generator_writes_anew(home, tmp_path, monkeypatch):
    first = prepare.tiny_root(tmp_path)
    monkeypatch.setattr(prepare, "TINY_VERSION", prepare.TINY_VERSION + 1)
    second = prepare.tiny_root(tmp_path)
    assert first != second
    assert digest(first) == digest(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RENDERERS)
def test_components(name, dtype, home):
    parts = load_renderer(resolve(name, "renderer", root=home.parent), device="cpu", dtype=dtype)
    assert (parts.is_turbo, parts.is_xl) == (name != "tiny-base", name == "tiny-xl")
    assert parts.condition_encoder.silence_latent.shape == (1, 15_000, 8)
    assert parts.condition_encoder.silence_latent.std() > 0.01
    assert parts.vae.hop_length == 1_920
    assert parts.vae.sampling_rate == 48_000
    assert parts.audio_tokenizer.quantizer.codebook_size == 64_000
    modules = (
        parts.text_encoder, parts.condition_encoder, parts.transformer, parts.vae, parts.audio_tokenizer,
        parts.audio_token_detokenizer,
    )  # fmt: skip
    for module in modules:
        assert not module.training
        assert all(p.dtype == dtype and not p.requires_grad for p in module.parameters())


def test_tokenizer_is_byte_level_and_ends_with_the_end_token(home):
    tokenizer = load_renderer(
        resolve("tiny", "renderer", root=home.parent), device="cpu", dtype=torch.float32
    ).tokenizer
    text = "# Caption\ncalm piano, 雨 [Verse] ré♭ 🎵"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode()) + 1
    assert tokenizer.decode(ids[:-1]) == text
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_audio_is_finite_audible_and_follows_the_latents(home):
    parts = load_renderer(resolve("tiny", "renderer", root=home.parent), device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        one, two = (parts.vae.decode(torch.randn(1, 8, 50, generator=generator)).sample for _ in range(2))
    assert one.shape == (1, 2, 50 * 1_920)
    assert torch.isfinite(one).all()
    assert 0.01 < one.std() < 1.0
    assert (one - two).norm() / one.norm() > 0.5


def test_codes_differ_with_the_sound(home):
    parts = load_renderer(resolve("tiny", "renderer", root=home.parent), device="cpu", dtype=torch.float32)
    latents = torch.randn(1, 250, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        codes = parts.audio_tokenizer.tokenize(latents)[1].flatten()
    assert len(codes) == 50
    assert len(codes.unique()) > 30
    assert codes.min() >= 0
    assert codes.max() < 64_000


def test_silence_must_not_be_zeros(home, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(home / "tiny-diffusers", folder)
    weights = next((folder / "condition_encoder").glob("*.safetensors"))
    edit_weights(weights, lambda state: state["silence_latent"].zero_())
    with pytest.raises(ModelMissing, match="drones"):
        load_renderer(resolve(str(folder), "renderer", root=tmp_path), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_loading_is_strict(part, home, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(home / "tiny-diffusers", folder)
    weights = next((folder / part).glob("*.safetensors"))
    edit_weights(weights, lambda state: state.pop(sorted(state)[0]))
    found = resolve(str(folder), "renderer", root=tmp_path)
    with pytest.raises(ModelMissing, match=r"missing: \S+") as caught:
        load_renderer(found, device="cpu", dtype=torch.float32)
    assert caught.value.details["path"] == str(folder / part)

    edit_weights(weights, lambda state: state.update(extra=torch.zeros(3)))
    with pytest.raises(ModelMissing, match="unexpected: extra"):
        load_renderer(found, device="cpu", dtype=torch.float32)

    edit_weights(weights, lambda state: state.update({min(state.keys() - {"extra"}): torch.zeros(3, 1, 4)}))
    with pytest.raises(ModelMissing, match="of another shape: "):
        load_renderer(found, device="cpu", dtype=torch.float32)


def test_weights_of_a_kind_that_nobody_knows_are_refused_as_such(home, tmp_path):
    """The file is whole; only who opens it finds out."""
    folder = tmp_path / "edited"
    shutil.copytree(home / "tiny-diffusers", folder)
    weights = next((folder / "vae").glob("*.safetensors"))
    data = weights.read_bytes()
    assert b'"BF16"' in data
    weights.write_bytes(data.replace(b'"BF16"', b'"BX16"', 1))
    with pytest.raises(ModelMissing, match="vae cannot be loaded"):
        load_renderer(resolve(str(folder), "renderer", root=tmp_path), device="cpu", dtype=torch.float32)


def test_numbers_are_what_from_pretrained_loads(home):
    """In half precision, too: what is computed and not read from files stays in float32."""
    found = resolve(str(home / "tiny-diffusers"), "renderer", root=home)
    for dtype in (torch.float32, torch.bfloat16):
        ours = load_renderer(found, device="cpu", dtype=dtype)
        for name in ("text_encoder", "condition_encoder", "transformer", "vae", "audio_tokenizer"):
            theirs = component_class(name).from_pretrained(found.path / name, dtype=dtype, local_files_only=True)
            mine = getattr(ours, name)
            expected = dict([*theirs.named_parameters(), *theirs.named_buffers()])
            loaded = dict([*mine.named_parameters(), *mine.named_buffers()])
            assert loaded.keys() == expected.keys()
            for key, value in expected.items():
                assert loaded[key].dtype == value.dtype, key
                assert torch.equal(loaded[key], value), key
