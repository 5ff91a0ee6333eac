"""A renderer with another VAE than its checkpoint's: named, loaded, in the song and its facts; unknown ones are errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from acestep.checkpoints import Checkpoint, resolve
from acestep.checkpoints import other_vae as choice
from acestep.checkpoints.hub import Place
from acestep.cli.local import Studio
from acestep.errors import ModelMissing
from acestep.request import SongRequest
from acestep.settings.resolve import resolve as resolve_settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return resolve("tiny", "renderer", root=root), root


@pytest.fixture
def another(tiny: tuple[Checkpoint, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "another"
    shutil.copytree(tiny[0].path / "vae", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "decoder.conv1.bias": weights["decoder.conv1.bias"] + 0.5}, file, {"format": "pt"})
    return folder


def test_the_official_one_is_the_checkpoints_own(tiny: tuple[Checkpoint, Path]) -> None:
    checkpoint, root = tiny
    assert resolve("tiny", "renderer", root=root, vae="official") == checkpoint
    assert (checkpoint.vae, checkpoint.vae_path) == ("official", None)


def test_a_folder_by_its_path(tiny: tuple[Checkpoint, Path], another: Path) -> None:
    checkpoint, root = tiny
    found = resolve("tiny", "renderer", root=root, vae=str(another))
    assert (found.vae, found.vae_path, found.path) == (str(another), another, checkpoint.path)
    assert found.hash != checkpoint.hash
    assert found.hash == resolve("tiny", "renderer", root=root, vae=str(another)).hash


def test_a_published_one_beside_the_checkpoints_or_from_the_hub(
    tiny: tuple[Checkpoint, Path], another: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = tiny
    asked: list[str] = []

    def download(repository: str, **_: Any) -> Place:
        asked.append(repository)
        return Place(another, "commit")

    monkeypatch.setattr(choice, "download_model", download)
    assert choice.with_vae(checkpoint, "scragvae", tmp_path).vae_path == another
    assert asked == ["scragnog/Ace-Step-1.5-ScragVAE"]
    shutil.copytree(another, tmp_path / "scragvae")
    assert choice.with_vae(checkpoint, "scragvae", tmp_path).vae_path == tmp_path / "scragvae"
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["scragVAE2", "relative/folder", "/no/such/folder", ""])
def test_an_unknown_one_is_an_error_that_names_the_known(tiny: tuple[Checkpoint, Path], name: str) -> None:
    with pytest.raises(ModelMissing, match=r"vae_model: .*official, scragvae"):
        resolve("tiny", "renderer", root=tiny[1], vae=name)


def test_one_of_other_latents_is_an_error(tiny: tuple[Checkpoint, Path], another: Path) -> None:
    config = json.loads((another / "config.json").read_text())
    (another / "config.json").write_text(json.dumps({**config, "decoder_input_channels": 12}))
    with pytest.raises(ModelMissing, match=r"decoder_input_channels 12 instead of 8"):
        resolve("tiny", "renderer", root=tiny[1], vae=str(another))
    (another / "diffusion_pytorch_model.safetensors").unlink()
    (another / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelMissing, match="safetensors"):
        resolve("tiny", "renderer", root=tiny[1], vae=str(another))


def test_a_song_by_it(another: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ACESTEP_VAE_CHECKPOINT", str(another))
    assert resolve_settings("render", {"device": "cpu"}).renderer.vae_model == str(another)  # type: ignore[union-attr]
    request = SongRequest(prompt="p", duration=10, steps=1, seed=1, thinking=False, use_cot_metas=False)
    songs = []
    for settings in ({"device": "cpu"}, {"device": "cpu", "vae_model": "official"}):  # what is said wins
        with Studio(settings) as studio:
            songs.append(studio.make(request).song)
            assert studio.renderer().info.vae == settings.get("vae_model", str(another))
    assert songs[0].items[0].files[0].sha256 != songs[1].items[0].files[0].sha256
    assert songs[0].renderer_hash != songs[1].renderer_hash
