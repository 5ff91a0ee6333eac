"""Names, repositories and folders: where each is found, and what is said where it is not."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from checkpoint_edits import edit_config
from huggingface_hub import constants

from acestep.checkpoints import TINY_RENDERERS, hub, published, resolve, variant_defaults
from acestep.errors import ModelMissing, StoragePermission
from acestep.song import TINY_NOTICE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache, offline: what is in it is read by the real client, and nothing else can be."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_downloads_go_where_this_user_can_write(tmp_path, monkeypatch):
    """Without a home the Hub would take `~` below the working directory; then the state directory is the place."""
    for name in hub._CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    for usual, place in (
        ("~nobody-at-all/.cache/huggingface/hub", tmp_path / "state" / "hub"),
        ("/proc/nowhere/hub", tmp_path / "state" / "hub"),
        (str(tmp_path / "home" / "hub"), tmp_path / "home" / "hub"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", usual)
        monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
        assert hub.cache_dir() == place
    monkeypatch.setenv("HF_HOME", "/proc/nowhere")  # somebody wants it there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nowhere/hub")
    assert str(hub.cache_dir()) == "/proc/nowhere/hub"


def test_a_cache_that_cannot_be_written_is_no_missing_model(hub_cache, monkeypatch):
    def refuse(*_, cache_dir, **__):
        raise PermissionError(13, "Permission denied", str(cache_dir))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(StoragePermission, match="HF_HOME") as caught:
        hub.download_model("ACE-Step/acestep-v15-base")
    assert caught.value.details["path"] == str(hub_cache)


def cached(hub_cache, repository, commit=COMMIT):
    """The snapshot folder of a repository in the cache."""
    place = hub_cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs/main").write_text(commit)
    return snapshot


def refused(name, kind="renderer", **kwargs):
    with pytest.raises(ModelMissing) as caught:
        resolve(name, kind, **kwargs)
    assert caught.value.details.keys() & {"path", "repository"}
    return caught.value


@pytest.mark.parametrize("name", TINY_RENDERERS)
def test_tiny_names(name, home):
    found = resolve(name, "renderer", root=home.parent)
    assert (found.name, found.kind, found.notice) == (name, "renderer", TINY_NOTICE)
    assert found.path == home / f"{name}-diffusers"
    base = name == "tiny-base"
    assert (found.defaults.steps, found.defaults.max_steps) == ((50, 200) if base else (8, 20))
    assert (found.defaults.shift, found.defaults.guidance_scale) == ((1.0, 7.0) if base else (3.0, 1.0))
    assert ("lego" in found.defaults.tasks) == base


def test_the_tiny_planner(home):
    found = resolve("tiny-lm", "planner", root=home.parent)
    assert (found.path, found.defaults, found.notice) == (home / "tiny-lm", None, TINY_NOTICE)


def test_the_notice_follows_the_model_and_not_its_name(home):
    assert resolve(str(home / "tiny"), "renderer", root=home).notice == TINY_NOTICE
    assert resolve(str(home / "tiny-lm"), "planner", root=home).notice == TINY_NOTICE


def test_wrong_kinds_are_named(home):
    assert "tiny-lm" in refused("tiny", "planner", root=home.parent).message
    assert "called tiny." in refused("tiny-lm", "renderer", root=home.parent).message
    assert "is a planner" in refused("acestep-5Hz-lm-4B", "renderer", root=home).message
    assert "is a renderer" in refused("acestep-v15-turbo", "planner", root=home).message
    assert "holds a planner" in refused(str(home / "tiny-lm"), "renderer", root=home).message
    assert "no planner" in refused(str(home / "tiny"), "planner", root=home).message


@pytest.fixture
def upstream(originals):
    """What a user of ACE-Step's own tools has on disk."""
    (originals / "tiny").rename(originals / "acestep-v15-turbo")
    (originals / "tiny-lm").rename(originals / "acestep-5Hz-lm-1.7B")
    return originals


def test_an_upstream_folder_is_used_and_nothing_downloaded(upstream, hub_cache, monkeypatch):
    monkeypatch.setenv("ACESTEP_CHECKPOINTS", str(upstream))
    renderer = resolve("acestep-v15-turbo", "renderer")
    assert (renderer.name, renderer.path) == ("acestep-v15-turbo", upstream / "acestep-v15-turbo-diffusers")
    assert resolve("ACE-Step/acestep-v15-turbo", "renderer").path == renderer.path
    assert resolve("acestep-5Hz-lm-1.7B", "planner").path == upstream / "acestep-5Hz-lm-1.7B"
    # Its name as a plain folder name, for models that are not published.
    assert resolve("tiny-base", "renderer").name == "tiny-base"
    shutil.copytree(upstream / "tiny-base", upstream / "my-finetune")
    assert resolve("my-finetune", "renderer").path == upstream / "my-finetune-diffusers"


def test_a_root_gives_its_default_model(upstream, hub_cache, tmp_path):
    assert resolve(str(upstream), "renderer", root=tmp_path).name == "acestep-v15-turbo"
    assert resolve(str(upstream), "planner", root=tmp_path).name == "acestep-5Hz-lm-1.7B"
    shutil.rmtree(upstream / "acestep-5Hz-lm-1.7B")
    assert "not acestep-5Hz-lm-1.7B" in refused(str(upstream), "planner", root=tmp_path).message


def test_a_model_folder_alone_takes_vae_and_text_encoder_from_the_root(upstream, hub_cache, tmp_path):
    alone = tmp_path / "elsewhere" / "my-model"
    shutil.move(upstream / "acestep-v15-turbo", alone)
    assert resolve(str(alone), "renderer", root=upstream).path == alone.with_name("my-model-diffusers")
    shutil.rmtree(alone.with_name("my-model-diffusers"))
    error = refused(str(alone), root=tmp_path / "empty")
    assert error.details["repository"] == "ACE-Step/Ace-Step1.5"


def test_the_hub_cache_is_read_offline_and_the_revision_is_kept(upstream, hub_cache, tmp_path):
    snapshot = cached(hub_cache, "ACE-Step/Ace-Step1.5")
    for folder in ("acestep-v15-turbo", "vae", "Qwen3-Embedding-0.6B", "acestep-5Hz-lm-1.7B"):
        shutil.move(upstream / folder, snapshot / folder)
    root = tmp_path / "root"
    for name in ("acestep-v15-turbo", "ACE-Step/Ace-Step1.5"):
        found = resolve(name, "renderer", root=root)
        assert found.revision == COMMIT
        assert found.name == "acestep-v15-turbo"
        assert found.path == root / f"acestep-v15-turbo-{COMMIT[:8]}-diffusers"
    assert not list(snapshot.glob("*-diffusers"))  # the shared cache is left as it was
    planner = resolve("acestep-5Hz-lm-1.7B", "planner", root=root, download=False)
    assert (planner.path, planner.revision) == (snapshot / "acestep-5Hz-lm-1.7B", COMMIT)
    assert "revision v9" in refused("acestep-v15-turbo", root=root, revision="v9").message
    assert resolve("acestep-v15-turbo", "renderer", root=root, revision=COMMIT).path == found.path
    assert "revision" in refused(str(found.path), root=root, revision=COMMIT).message
    assert "revision" in refused("tiny", root=root, revision=COMMIT).message


def test_a_pinned_model_takes_its_vae_from_the_same_commit(upstream, hub_cache, tmp_path):
    other = "f" * 40
    for commit in (other, COMMIT):  # the last is what `main` points to
        snapshot = cached(hub_cache, "ACE-Step/Ace-Step1.5", commit)
        for folder in ("acestep-v15-turbo", "vae", "Qwen3-Embedding-0.6B"):
            shutil.copytree(upstream / folder, snapshot / folder)
    edit_config(hub_cache / f"models--ACE-Step--Ace-Step1.5/snapshots/{other}/vae/config.json", _marks)
    root = tmp_path / "root"
    found = resolve("acestep-v15-turbo", "renderer", root=root, revision=other)
    assert json.loads((found.path / "vae/config.json").read_text())["mark"] == 1
    found = resolve("acestep-v15-turbo", "renderer", root=root)
    assert "mark" not in json.loads((found.path / "vae/config.json").read_text())


def _marks(config):
    config["mark"] = 1


def test_a_diffusers_repository_is_used_as_it_is(home, hub_cache, tmp_path):
    snapshot = cached(hub_cache, "somebody/finetune-diffusers")
    shutil.copytree(home / "tiny-xl-diffusers", snapshot, dirs_exist_ok=True)
    found = resolve("somebody/finetune-diffusers", "renderer", root=tmp_path)
    assert (found.name, found.revision, found.path) == ("finetune-diffusers", COMMIT, snapshot)
    assert not list(tmp_path.glob("*-diffusers"))


def test_a_model_may_have_defaults_of_its_own(upstream, hub_cache):
    (upstream / "acestep-v15-turbo").rename(upstream / "acestep-v15-turbo-shift1")
    assert resolve("acestep-v15-turbo-shift1", "renderer", root=upstream).defaults.shift == 1.0
    assert variant_defaults(True, "acestep-v15-turbo-shift3").shift == 3.0
    for name in published():
        variant_defaults(True, name)


def test_offline_and_absent(hub_cache, tmp_path):
    for name, row in published().items():
        error = refused(name, row.kind, root=tmp_path)
        assert error.details["repository"] == row.repository
        assert "HF_HUB_OFFLINE" in error.message
    assert refused("some/model", root=tmp_path).details["repository"] == "some/model"


@pytest.mark.parametrize("name", ["../../etc", "/nonexistent/folder", "~/nonexistent-folder", "", "   "])
def test_what_is_no_checkpoint(name, tmp_path):
    refused(name, root=tmp_path)


def test_an_unknown_name_lists_the_known(tmp_path):
    message = refused("acestep-v16", root=tmp_path).message
    assert "acestep-v15-turbo" in message
    assert str(tmp_path / "acestep-v16") in message


def test_a_bare_name_never_means_the_working_directory(home, hub_cache, tmp_path, monkeypatch):
    shutil.copytree(home / "tiny-diffusers", tmp_path / "acestep-v15-turbo")
    monkeypatch.chdir(tmp_path)
    assert refused("acestep-v15-turbo", root=tmp_path / "root").details["repository"]
    assert resolve("./acestep-v15-turbo", "renderer", root=tmp_path / "root").path == tmp_path / "acestep-v15-turbo"


@pytest.mark.parametrize(
    "part", ["transformer", "condition_encoder", "audio_tokenizer", "vae", "text_encoder", "tokenizer"]
)
def test_an_incomplete_diffusers_folder_names_what_is_missing(part, home, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(home / "tiny-diffusers", folder)
    shutil.rmtree(folder / part)
    assert part in refused(str(folder), root=tmp_path).message


def test_pickled_weights_are_not_taken(home, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(home / "tiny-diffusers", folder)
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    assert "pickle" in refused(str(folder), root=tmp_path).message


def test_an_index_cannot_reach_outside_its_folder(home, tmp_path):
    folder = tmp_path / "escaping"
    shutil.copytree(home / "tiny-diffusers", folder)
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (folder / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in refused(str(folder), root=tmp_path).message


def test_hash_depends_on_content_alone_and_is_remembered(home, tmp_path):
    copies = [tmp_path / name for name in ("one", "two")]
    for folder in copies:
        shutil.copytree(home / "tiny-diffusers", folder, ignore=shutil.ignore_patterns(".*"))
    one, two = (resolve(str(folder), "renderer", root=tmp_path).hash for folder in copies)
    assert one == two
    assert len(one) == 64
    weights = copies[0] / "audio_tokenizer/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert resolve(str(copies[0]), "renderer", root=tmp_path).hash != one

    side = copies[1] / ".content-hash"
    known = json.loads(side.read_text())
    side.write_text(json.dumps({**known, "sha256": "remembered"}))
    assert resolve(str(copies[1]), "renderer", root=tmp_path).hash == "remembered"
    side.write_text("broken")
    assert resolve(str(copies[1]), "renderer", root=tmp_path).hash == two


def test_resolving_needs_no_torch(home):
    code = (
        "import sys; from pathlib import Path; from acestep.checkpoints import resolve; "
        f"resolve('tiny', 'renderer', root=Path({str(home.parent)!r})).hash; "
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
