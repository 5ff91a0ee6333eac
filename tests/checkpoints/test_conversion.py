"""The original layout becomes exactly the diffusers twin, or an error that names what does not fit."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_edits import edit_config, edit_weights, shard
from safetensors.torch import load_file

from acestep.checkpoints import prepare, resolve
from acestep.checkpoints.convert import component_configs, component_of
from acestep.checkpoints.load import load_renderer
from acestep.checkpoints.modules import component_class
from acestep.errors import ModelMissing, StoragePermission

RENDERERS = ("tiny", "tiny-base", "tiny-xl")
COMPONENTS = (
    "transformer", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer", "vae", "text_encoder",
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def assert_same_model(converted: Path, twin: Path) -> None:
    for component in COMPONENTS:
        ours, expected = weights(converted / component), weights(twin / component)
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert ours[key].dtype == value.dtype, key
            assert torch.equal(ours[key], value), key
        assert json.loads((converted / component / "config.json").read_text()) == json.loads(
            (twin / component / "config.json").read_text()
        )
    for file in ("tokenizer/tokenizer.json", "model_index.json", "scheduler/scheduler_config.json"):
        assert (converted / file).read_bytes() == (twin / file).read_bytes()


@pytest.mark.parametrize(
    ("original", "place"),
    [
        ("decoder.proj_in.1.weight", ("transformer", "proj_in_conv.weight")),
        ("decoder.proj_out.1.bias", ("transformer", "proj_out_conv.bias")),
        ("decoder.layers.3.self_attn.q_proj.weight", ("transformer", "layers.3.self_attn.to_q.weight")),
        ("decoder.layers.3.cross_attn.o_proj.weight", ("transformer", "layers.3.cross_attn.to_out.0.weight")),
        ("decoder.layers.3.cross_attn.k_norm.weight", ("transformer", "layers.3.cross_attn.norm_k.weight")),
        ("decoder.time_embed_r.linear_1.bias", ("transformer", "time_embed_r.linear_1.bias")),
        ("encoder.text_projector.weight", ("condition_encoder", "text_projector.weight")),
        (
            "encoder.lyric_encoder.layers.0.self_attn.v_proj.weight",
            ("condition_encoder", "lyric_encoder.layers.0.self_attn.to_v.weight"),
        ),
        ("encoder.timbre_encoder.special_token", ("condition_encoder", "timbre_encoder.special_token")),
        ("null_condition_emb", ("condition_encoder", "null_condition_emb")),
        ("tokenizer.quantizer.project_in.weight", ("audio_tokenizer", "quantizer.project_in.weight")),
        (
            "tokenizer.attention_pooler.layers.1.self_attn.q_norm.weight",
            ("audio_tokenizer", "attention_pooler.layers.1.self_attn.norm_q.weight"),
        ),
        ("detokenizer.proj_out.weight", ("audio_token_detokenizer", "proj_out.weight")),
        ("detokenizer.special_tokens", ("audio_token_detokenizer", "special_tokens")),
        ("ema.decoder.proj_in.1.weight", None),
        ("silence_latent", None),
    ],
)
def test_published_names(original, place):
    assert component_of(original) == place


@pytest.mark.parametrize("name", RENDERERS)
def test_conversion_equals_the_twin_bit_for_bit(name, home, originals):
    found = resolve(str(originals / name), "renderer", root=originals)
    assert found.path == originals / f"{name}-diffusers"
    assert_same_model(found.path, home / f"{name}-diffusers")
    components = load_renderer(found, device="cpu", dtype=torch.float32)
    twin = load_renderer(resolve(name, "renderer", root=home.parent), device="cpu", dtype=torch.float32)
    for part in COMPONENTS:
        ours, expected = getattr(components, part).state_dict(), getattr(twin, part).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in expected.items())


def test_shards_on_either_side(home, originals):
    for folder in (originals / "tiny-xl", originals / "Qwen3-Embedding-0.6B"):
        shard(folder)
    shard(originals / "vae", "diffusion_pytorch_model")
    found = resolve(str(originals / "tiny-xl"), "renderer", root=originals)
    assert_same_model(found.path, home / "tiny-xl-diffusers")
    load_renderer(found, device="cpu", dtype=torch.float32)
    (originals / "tiny" / "model.safetensors").unlink()
    shutil.copy(originals / "tiny-xl/model.safetensors.index.json", originals / "tiny")
    with pytest.raises(ModelMissing, match=r"model-00001-of-00002\.safetensors is missing"):
        resolve(str(originals / "tiny"), "renderer", root=originals)


PUBLISHED_2B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "in_channels": 192, "audio_acoustic_hidden_dim": 64, "patch_size": 2,
    "rope_theta": 1_000_000, "attention_bias": False, "attention_dropout": 0.0, "rms_norm_eps": 1e-6,
    "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12, "text_hidden_dim": 1024,
    "timbre_hidden_dim": 64, "num_lyric_encoder_hidden_layers": 8, "num_timbre_encoder_hidden_layers": 4,
}  # fmt: skip
PUBLISHED_XL = PUBLISHED_2B | {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 32, "num_attention_heads": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 16, "encoder_hidden_size": 2048,
    "encoder_intermediate_size": 6144, "encoder_num_attention_heads": 16, "encoder_num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "dit_parameters"), [(PUBLISHED_2B, 1_575_458_880), (PUBLISHED_XL, 4_168_897_088)], ids=["2B", "XL"]
)
def test_published_sizes(config, dit_parameters):
    """Parameter counts that follow from the sizes of the published weight files."""
    counts = {}
    for name, arguments in component_configs(config, Path("config.json")).items():
        with torch.device("meta"):
            module = component_class(name).from_config(arguments)
        counts[name] = sum(p.numel() for p in module.parameters())
    assert counts == {
        "transformer": dit_parameters,
        "condition_encoder": 608_369_664,
        "audio_tokenizer": 105_032_198,
        "audio_token_detokenizer": 105_011_776,
    }


def _removes(key):
    return lambda state: state.pop(key)


def _adds(key, like):
    return lambda state: state.update({key: state[like].clone()})


def _reshapes(key):
    return lambda state: state.update({key: state[key][:-1].clone()})


PROJ = "decoder.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_removes(PROJ), "missing transformer.layers.0.self_attn.to_q.weight"),
        (_removes("null_condition_emb"), "missing condition_encoder.null_condition_emb"),
        (_removes("detokenizer.special_tokens"), "missing audio_token_detokenizer.special_tokens"),
        (
            _adds("decoder.layers.9.self_attn.q_proj.weight", PROJ),
            "left over transformer.layers.9.self_attn.to_q.weight",
        ),
        (_adds("model.extra", PROJ), "belong to no component: model.extra"),
        (_reshapes(PROJ), r"shape of transformer.layers.0.self_attn.to_q.weight is \(31, 32\), not \(32, 32\)"),
    ],
    ids=["dit key", "null", "special tokens", "left over", "unknown", "shape"],
)
def test_what_does_not_fit_is_listed_and_nothing_is_left_behind(change, named, originals):
    edit_weights(originals / "tiny/model.safetensors", change)
    with pytest.raises(ModelMissing, match=named) as caught:
        resolve(str(originals / "tiny"), "renderer", root=originals)
    assert caught.value.details["path"] == str(originals / "tiny")
    assert not list(originals.glob("*diffusers*/"))
    assert not list(originals.glob(".*partial*"))


def test_a_missing_config_field_is_named(originals):
    edit_config(originals / "tiny/config.json", lambda config: config.pop("patch_size"))
    with pytest.raises(ModelMissing, match="patch_size"):
        resolve(str(originals / "tiny"), "renderer", root=originals)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-executed",)


def test_a_model_of_parts_stays_one(originals):
    edit_config(originals / "tiny-base" / "config.json", lambda config: config.update(is_lego_sft=True))
    checkpoint = resolve(str(originals / "tiny-base"), "renderer", root=originals)
    assert checkpoint.defaults.lego_sft
    load_renderer(checkpoint, device="cpu", dtype=torch.float32)
    assert not resolve(str(originals / "tiny"), "renderer", root=originals).defaults.lego_sft


def test_silence_is_required_and_read_without_running_pickles(originals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silence = originals / "tiny/silence_latent.pt"

    def refused(match):
        with pytest.raises(ModelMissing, match=match) as caught:
            resolve(str(originals / "tiny"), "renderer", root=originals)
        assert caught.value.details["path"] == str(silence)

    silence.unlink()
    refused("drones")
    silence.write_bytes(pickle.dumps(_Bomb()))
    refused("plain tensor")
    torch.save(_Bomb(), silence)
    refused("plain tensor")
    assert not (tmp_path / "pickle-was-executed").exists()
    torch.save(torch.zeros(1, 15_000, 8), silence)
    refused(r"\(1, 15000, 8\)")
    torch.save({"latent": 1}, silence)
    refused("dict")


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
@pytest.mark.parametrize("file", ["tiny/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_a_broken_file_is_named(file, damage, originals):
    path = originals / file
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-100], "header": b"\xff" * 8 + data[8:], "empty": b""}[damage])
    with pytest.raises(ModelMissing, match="not a whole safetensors file") as caught:
        resolve(str(originals / "tiny"), "renderer", root=originals)
    assert caught.value.details["path"] == str(path)


def test_a_conversion_is_reused_until_its_source_changes(originals):
    first = resolve(str(originals / "tiny"), "renderer", root=originals)
    inode = (first.path / "transformer/config.json").stat().st_ino
    assert (
        resolve(str(originals / "tiny"), "renderer", root=originals).path / "transformer/config.json"
    ).stat().st_ino == inode
    assert (first.path / ".content-hash").is_file()  # known before anybody asks, for volumes that are read-only later
    hash_before = first.hash

    # Another model is put in the same place.
    shutil.rmtree(originals / "tiny")
    shutil.copytree(originals / "tiny-base", originals / "tiny")
    second = resolve(str(originals / "tiny"), "renderer", root=originals)
    assert second.path == first.path
    assert second.defaults.steps == 50
    assert second.hash != hash_before
    assert not list(originals.glob(".*old*"))


def test_where_the_source_cannot_be_written_the_root_is_used(originals, tmp_path, monkeypatch):
    real = prepare.writable

    def refuse(directory):
        if directory == originals:
            raise StoragePermission("read-only", path=str(directory))
        return real(directory)

    monkeypatch.setattr(prepare, "writable", refuse)  # the tests may run as root, whom no mode bit stops
    root = tmp_path / "root"
    found = resolve(str(originals / "tiny"), "renderer", root=root)
    assert found.path == root / "tiny-diffusers"
    assert resolve(str(originals / "tiny"), "renderer", root=root).path == found.path


def test_a_folder_in_the_way_is_not_overwritten(originals):
    other = originals / "tiny-diffusers"
    other.mkdir()
    (other / "thesis.txt").write_text("dear")
    with pytest.raises(ModelMissing, match="in the way"):
        resolve(str(originals / "tiny"), "renderer", root=originals)
    assert (other / "thesis.txt").read_text() == "dear"


def test_a_twin_made_by_another_converter_is_used(home, originals):
    shutil.copytree(home / "tiny-diffusers", originals / "tiny-diffusers")
    before = (originals / "tiny-diffusers/transformer/config.json").stat().st_mtime_ns
    found = resolve(str(originals / "tiny"), "renderer", root=originals)
    assert (found.path / "transformer/config.json").stat().st_mtime_ns == before


BOTH = """
import sys
from pathlib import Path
from acestep.checkpoints import resolve
root, originals = Path(sys.argv[1]), Path(sys.argv[2])
for found in (resolve("tiny", "renderer", root=root), resolve(str(originals / "tiny"), "renderer", root=root)):
    print((found.path / "transformer/config.json").stat().st_ino, found.hash)
"""


def test_two_processes_that_start_together_write_once(originals, tmp_path):
    command = [sys.executable, "-c", BOTH, str(tmp_path / "root"), str(originals)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == ""  # and no library chatters while it does
    assert len(outputs[0][0].split()) == 4
    left = [p.name for p in [*(tmp_path / "root").iterdir(), *originals.iterdir()] if "partial" in p.name]
    assert not left
