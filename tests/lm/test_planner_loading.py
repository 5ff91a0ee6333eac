"""Checkpoints as they are found: sharded, prefix-less, untied, and all the ways to be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from acestep.checkpoints.tiny_planner import write_tiny_planner
from acestep.errors import DeviceUnavailable, ModelMissing, OutOfMemory
from acestep.lm.loading import load_model
from acestep.lm.planner import Planner
from acestep.lm.pointwise import Pointwise
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.song import TINY_NOTICE
from acestep.stage_settings import PlannerSettings


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "planner"))


def load(folder: Path) -> object:
    return load_model(folder, device=torch.device("cpu"), dtype=torch.float32, max_len=64)


def hidden(folder: Path) -> torch.Tensor:
    """The model's answer to a prompt, with plain causal attention."""
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32, max_len=64)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(q.shape[2], -1)

    return model.forward(torch.arange(40, 60), torch.arange(20), attend) @ model.head.T


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_prefix(folder: Path) -> None:
    rewrite(folder, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})


def with_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})


def untied(folder: Path) -> None:
    with_head(folder)
    edit_config(folder, tie_word_embeddings=False)


def test_the_forward_is_transformers_own(checkpoint: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.arange(40, 60)[None]).logits[0]
    assert torch.allclose(hidden(checkpoint), expected, atol=1e-5)


def test_fused_kernels_compute_the_same_for_any_number_of_tokens(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as for a card, without its code generator, which takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    written, fused = (load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32, max_len=64) for _ in "ab")
    fused.compile()
    assert fused._pointwise != Pointwise()
    for tokens in (9, 2, 8, 60, 32):
        ids, positions = torch.arange(tokens), torch.arange(tokens)
        expected = written.forward(ids, positions, lambda layer, q, k, v: q.flatten(1))
        # All is compiled by now: more of it would stop a card's songs for seconds.
        with torch._dynamo.config.patch(error_on_recompile=True):
            got = fused.forward(ids, positions, lambda layer, q, k, v: q.flatten(1))
        assert torch.allclose(got, expected, atol=1e-5)


def test_where_nothing_compiles_the_kernels_stay_as_they_are(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32, max_len=64)
    model.compile()
    assert model._pointwise == Pointwise()
    assert "torch.compile failed on cpu" in caplog.text


@pytest.mark.parametrize("change", [shard, without_prefix, with_head, untied])
def test_every_layout_loads_alike(checkpoint: Path, copy: Path, change: Callable[[Path], None]) -> None:
    change(copy)
    assert torch.equal(hidden(copy), hidden(checkpoint))


def test_the_tokenizer_loads_from_either_set_of_files(copy: Path, tokenizer: PlannerTokenizer) -> None:
    (copy / "tokenizer.json").unlink()
    other = PlannerTokenizer.load(copy)
    text = "Ein Lied, 120 bpm\n\n[Verse]\nd'accord … 音"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.added == tokenizer.added


def test_the_tokenizer_agrees_with_transformers(checkpoint: Path, tokenizer: PlannerTokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(checkpoint)
    text = "a piano, 120 bpm.\n\nIt's  nice\n"
    assert reference(text).input_ids == tokenizer.encode(text)
    assert reference.convert_tokens_to_ids("<|audio_code_3|>") == tokenizer.first_code + 3


def drop_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def drop_audio_codes(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] = [t for t in document["added_tokens"] if "audio_code" not in t["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def drop_one_audio_code(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "<|audio_code_77|>"]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def drop_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: edit_config(f, model_type="llama"), "'llama'"),
        (lambda f: edit_config(f, vocab_size=99), "tokens"),
        (lambda f: edit_config(f, hidden_size=32), "config.json says"),
        (lambda f: edit_config(f, num_hidden_layers=3), "lacks the tensor"),
        (lambda f: edit_config(f, num_hidden_layers=1), "unknown tensors"),
        (lambda f: edit_config(f, tie_word_embeddings=False), "lm_head"),
        (lambda f: edit_config(f, attention_bias=True), "not supported"),
        (lambda f: (f / "model.safetensors").unlink(), "neither"),
        (drop_shard, "lacks 1 of 2 shards: model-00002-of-00002"),
        (truncate, "damaged"),
        (drop_audio_codes, "no <|audio_code_0|>"),
        (drop_one_audio_code, "not consecutive"),
        (drop_tokenizer, "no usable tokenizer"),
    ],
)
def test_what_is_wrong_is_said(copy: Path, change: Callable[[Path], object], said: str) -> None:
    change(copy)
    with pytest.raises(ModelMissing) as failure:
        Planner.load(copy, PlannerSettings(slots=2, max_len=256))
    assert said in failure.value.message
    assert str(copy) in failure.value.message
    assert failure.value.details["path"]


def test_other_failures_have_their_own_classes(checkpoint: Path) -> None:
    with pytest.raises(DeviceUnavailable):
        Planner.load(checkpoint, PlannerSettings(device="cuda:77"))
    with pytest.raises(OutOfMemory) as failure:
        Planner.load(checkpoint, PlannerSettings(memory_bytes=1_000_000))
    assert failure.value.details["needed_bytes"] > failure.value.details["free_bytes"]


def test_on_a_cpu_keys_and_values_take_half_of_what_the_process_may_have(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acestep.hardware.host.memory", lambda: (64 << 30, 8 << 20))
    planner = Planner.load(checkpoint, PlannerSettings(slots=64, max_len=1_024))
    planner.close()
    assert planner.stats()["kv_bytes"] == 4 << 20


def test_the_tiny_checkpoint_is_the_same_every_time(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_tiny_planner(tmp_path / name, seed=seed)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "c/model.safetensors").read_bytes()
    assert sum(p.stat().st_size for p in (tmp_path / "a").iterdir()) < 3_000_000


def test_a_planner_says_what_it_is(planner: Planner, checkpoint: Path) -> None:
    assert planner.info.name == checkpoint.name
    assert planner.info.notice == TINY_NOTICE
    assert planner.info.max_len == 4_096
    assert planner.info.weight_bytes < 2_000_000
