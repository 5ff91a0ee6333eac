"""Adapters: exactly alpha / r, on their own rows only, from safetensors only."""

import copy
import gc
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from acestep.adapters.cache import LoraCache
from acestep.adapters.load import load_adapter
from acestep.adapters.names import aliases, all_names, module_name
from acestep.errors import InvalidRequest
from acestep.request import Lora
from tests.adapters.written import (
    ALPHA,
    ATTENTION,
    CPU,
    F32,
    FOREIGN,
    RANK,
    TARGETS,
    active_of,
    applied,
    inputs,
    loaded,
    merged,
    original_name,
    pairs,
    refused,
    relative,
    run,
    same,
    state_as,
    write_peft,
)  # fmt: skip


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_equals_merged_weights_at_alpha_over_r(transformer, tmp_path, strength):
    weights = pairs(transformer)
    folder = write_peft(tmp_path / "a", weights)
    active = active_of(transformer, folder, strength)
    batch = inputs()
    plain = run(transformer, **batch)
    with applied(transformer, [active] * 3):
        ours = run(transformer, **batch)
    assert relative(ours, run(merged(transformer, weights, strength * ALPHA / RANK), **batch)) < 1e-5
    assert (relative(ours, plain) > 0.01) == (strength > 0)


def test_without_alpha_it_would_be_another_song(transformer, tmp_path):
    weights = pairs(transformer)
    active = active_of(transformer, write_peft(tmp_path / "a", weights))
    batch = inputs()
    with applied(transformer, [active] * 3):
        ours = run(transformer, **batch)
    assert relative(ours, run(merged(transformer, weights, 1.0), **batch)) > 0.01


def test_rows_do_not_see_each_others_adapters(transformer, tmp_path):
    cache = LoraCache(transformer, CPU, F32)
    first, second = (
        cache.get([Lora(path=str(write_peft(tmp_path / str(seed), pairs(transformer, seed))))]) for seed in (1, 2)
    )
    batch = inputs(4)
    rows = [first, None, second, first]
    with applied(transformer, rows):
        mixed = run(transformer, **batch)
    for i, lora in enumerate(rows):
        alone = {name: value[i : i + 1] for name, value in batch.items()}
        with applied(transformer, [lora]):
            assert relative(mixed[i : i + 1], run(transformer, **alone)) < 1e-6
    assert relative(mixed[1:2], run(transformer, **batch)[1:2]) < 1e-6
    assert relative(mixed[0:1], run(transformer, **batch)[0:1]) > 0.01


def test_nothing_stays_behind_not_even_after_a_failure(transformer, tmp_path):
    active = active_of(transformer, write_peft(tmp_path / "a", pairs(transformer)))
    batch = inputs(1)
    before = run(transformer, **batch)
    broken = {**batch, "context_latents": batch["context_latents"][..., :3]}
    with pytest.raises(RuntimeError), applied(transformer, [active]):
        run(transformer, **broken)
    assert torch.equal(run(transformer, **batch), before)
    assert not any(module._forward_hooks for module in transformer.modules())


def test_peft_itself_agrees(transformer, tmp_path):
    """Files made by PEFT with rank and alpha patterns, against PEFT's own forward."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_v", "down_proj"], init_lora_weights=False,
        rank_pattern={"layers.0.self_attn.to_q": 2}, alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    torch.manual_seed(0)
    model = inject_adapter_in_model(config, copy.deepcopy(transformer))
    state = {f"base_model.model.{k}": v.contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config.to_dict(), "target_modules": None}, default=str))
    active = active_of(transformer, tmp_path)
    assert active.parts[0][0].layers["layers.0.self_attn.to_q"].scale == 4.0
    assert active.parts[0][0].layers["layers.0.mlp.down_proj"].scale == 0.75
    batch = inputs()
    with applied(transformer, [active] * 3):
        assert relative(run(transformer, **batch), run(model, **batch)) < 1e-6


@pytest.mark.parametrize("writer", ["peft", "diffusers"])
def test_folders_as_libraries_write_them(writer, transformer, tmp_path, monkeypatch):
    """The whole way: saved by the library itself, with rsLoRA and an alpha of its own for some, against its own forward."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "up_proj", "to_out.0"], init_lora_weights=False, use_rslora=True,
        alpha_pattern={"layers.1.mlp.up_proj": 3, "to_out.0": 5}, rank_pattern={"to_q": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    model = copy.deepcopy(transformer)
    if writer == "peft":
        wrapped = get_peft_model(model, config)
        wrapped.save_pretrained(tmp_path / "final" / "adapter")
        model = wrapped.get_base_model()
    else:
        # The renderer's imports leave peft out of what diffusers believes to be installed.
        monkeypatch.setattr("diffusers.utils.import_utils._peft_available", True)
        model.add_adapter(config)
        model.save_lora_adapter(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    active = active_of(transformer, tmp_path)
    batch = inputs()
    plain, changed = run(transformer, **batch), run(model, **batch)
    assert relative(changed, plain) > 0.01
    with applied(transformer, [active] * 3):
        assert relative(run(transformer, **batch), changed) < 1e-6


def test_no_name_of_the_model_is_foreign_or_shared(transformer):
    names = [name for name, _ in transformer.named_modules()]
    known = all_names(names)
    for name in names[1:]:
        assert [module_name(alias.replace(".", joint), known) for alias in aliases(name) for joint in "._"] == [
            name
        ] * 4


def test_other_names_and_places_of_alpha(transformer, tmp_path):
    weights = pairs(transformer, targets=ATTENTION)

    def scales(path):
        return {layer.scale for layer in load_adapter(path, transformer, device=CPU, dtype=F32).layers.values()}

    flat = tmp_path / "flat"
    flat.mkdir()
    ours = {f"transformer.{name}.lora_A.weight": down for name, (down, _) in weights.items()}
    ours |= {f"transformer.{name}.lora_B.weight": up for name, (_, up) in weights.items()}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 12})}
    save_file(ours, flat / "diffusers.safetensors", metadata=metadata)
    assert scales(flat / "diffusers.safetensors") == {3.0}
    save_file(ours, flat / "bare.safetensors")
    assert scales(flat / "bare.safetensors") == {1.0}

    kohya = {f"decoder.{original_name(name)}.lora_down.weight": down for name, (down, _) in weights.items()}
    kohya |= {f"decoder.{original_name(name)}.lora_up.weight": up for name, (_, up) in weights.items()}
    kohya |= {f"decoder.{original_name(name)}.alpha": torch.tensor(2.0) for name in weights}
    save_file(kohya, flat / "kohya.safetensors")
    assert scales(flat / "kohya.safetensors") == {0.5}

    assert scales(write_peft(tmp_path / "rs", weights, use_rslora=True)) == {ALPHA / RANK**0.5}


def test_cached_by_content_and_bounded(transformer, tmp_path):
    weights = pairs(transformer)
    one = write_peft(tmp_path / "one", weights)
    same = write_peft(tmp_path / "same", weights)
    cache = LoraCache(transformer, CPU, F32)

    def get(path, cache=cache, scale=1.0):
        return cache.get([Lora(path=str(path), scale=scale)]).parts[0][0]

    adapter = get(one)
    assert get(same, scale=0.3) is adapter
    assert cache.get([]) is None
    # Another alpha is another adapter, even with the same weights; so is a file that was replaced.
    other = get(write_peft(tmp_path / "other", weights, lora_alpha=4))
    assert other.hash != adapter.hash
    write_peft(one, pairs(transformer, seed=5))
    assert get(one).hash not in (adapter.hash, other.hash)

    small = LoraCache(transformer, CPU, F32, max_bytes=adapter.bytes)
    for folder in (same, tmp_path / "other", same):
        assert get(folder, small)
        assert small.bytes == adapter.bytes
    with pytest.raises(InvalidRequest, match=r"together; .* is the most"):
        small.get([Lora(path=str(same)), Lora(path=str(tmp_path / "other"))])
    with pytest.raises(InvalidRequest, match="takes more than 0 MiB"):
        get(same, LoraCache(transformer, CPU, F32, max_bytes=adapter.bytes - 1))
    # What songs hold is counted, too, and is gone with them.
    small.drop()
    del adapter, other
    assert small.bytes == 0
    gc.collect()
    assert small.held_bytes == 0


@pytest.mark.parametrize("naming", [original_name, str], ids=["original", "diffusers"])
@pytest.mark.parametrize("form", FOREIGN.values(), ids=FOREIGN.keys())
def test_names_that_trainers_and_programs_give(form, naming, transformer, tmp_path):
    weights = pairs(transformer, targets=(*TARGETS, "time_embed_r.linear_1"))
    save_file(state_as(form, weights, naming), tmp_path / "any name.safetensors")
    same(loaded(tmp_path, transformer), weights)


@pytest.mark.parametrize("wrapper", ["original_mlp", "original_self_attn", "base_layer", "_checkpoint_wrapped_module"])
def test_modules_that_were_wrapped(wrapper, transformer, tmp_path):
    weights = pairs(transformer)

    def wrapped(name):
        head, _, last = original_name(name).rpartition(".")
        return f"{head}.{wrapper}.{last}" if head else f"{last}.{wrapper}"

    for form in ("peft", "kohya"):
        save_file(state_as(FOREIGN[form], weights, wrapped), tmp_path / "w.safetensors")
        same(loaded(tmp_path, transformer), weights)


@pytest.mark.parametrize(
    "place",
    [
        "adapter_model.safetensors",
        "final/adapter/adapter_model.safetensors",
        "final/adapter_model.safetensors",
        "adapter/adapter_model.safetensors",
        "best/adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "jazz-v3.safetensors",
        "final/adapter/jazz-v3.safetensors",
    ],
)
def test_places_where_trainers_leave_it(place, transformer, tmp_path):
    weights = pairs(transformer)
    file = write_peft((tmp_path / place).parent, weights) / "adapter_model.safetensors"
    file.rename(tmp_path / place)
    (tmp_path / "._adapter_model.safetensors").write_bytes(b"macOS")
    (tmp_path / "training_state.pt").write_bytes(b"never read")
    for path in (tmp_path, tmp_path / place):
        same(loaded(path, transformer), weights, ALPHA / RANK)


def test_a_known_name_wins_and_several_others_are_named(transformer, tmp_path):
    weights = pairs(transformer)
    write_peft(tmp_path, weights)
    other = state_as(FOREIGN["peft"], pairs(transformer, seed=3))
    for name in ("epoch_1.safetensors", "epoch_2.safetensors"):
        save_file(other, tmp_path / name)
    same(loaded(tmp_path, transformer), weights, ALPHA / RANK)
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, transformer, r"several .safetensors files \(epoch_1.safetensors, epoch_2.safetensors\)")


def test_a_convolution_as_peft_trains_it(transformer, tmp_path):
    """`proj_in` is a `Conv1d`: PEFT's own forward, all rows and single ones."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["proj_in_conv", "to_q"], init_lora_weights=False)
    torch.manual_seed(0)
    model = inject_adapter_in_model(config, copy.deepcopy(transformer))
    original = {"proj_in_conv": "proj_in.1", "to_q": "q_proj"}
    state = {}
    for key, value in get_peft_model_state_dict(model).items():
        for ours, theirs in original.items():
            key = key.replace(ours, theirs)
        state[f"base_model.model.{key}"] = value.contiguous()
    assert state["base_model.model.proj_in.1.lora_A.weight"].ndim == 3
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6}))
    active = active_of(transformer, tmp_path)
    batch = inputs()
    plain, changed = run(transformer, **batch), run(model, **batch)
    with applied(transformer, [active] * 3):
        assert relative(run(transformer, **batch), changed) < 1e-6
    with applied(transformer, [None, active, None]):
        mixed = run(transformer, **batch)
    assert relative(mixed[1], changed[1]) < 1e-6
    assert relative(mixed[::2], plain[::2]) < 1e-6


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_other_types_are_converted(stored, transformer, tmp_path):
    weights = {name: (a.to(stored), b.to(stored)) for name, (a, b) in pairs(transformer).items()}
    save_file(state_as(FOREIGN["peft"], weights), tmp_path / "a.safetensors")
    same(loaded(tmp_path, transformer), {name: (a.to(F32), b.to(F32)) for name, (a, b) in weights.items()})


def test_patterns_of_alpha_by_the_names_of_the_trained_model(transformer, tmp_path):
    patterns = {r"^layers\.0\.self_attn\.q_proj$": 2, "decoder.layers.1.mlp.original_mlp.down_proj": 3, "v_proj": 16}
    folder = write_peft(tmp_path, pairs(transformer), alpha_pattern=patterns)
    layers = loaded(folder, transformer).layers
    for name, alpha in {
        "layers.0.self_attn.to_q": 2, "layers.1.mlp.down_proj": 3, "layers.1.cross_attn.to_v": 16, "layers.1.self_attn.to_q": ALPHA,
    }.items():  # fmt: skip
        assert layers[name].scale == alpha / RANK
    refused(
        write_peft(tmp_path, pairs(transformer), alpha_pattern={"(a+)+": 2}), transformer, r"alpha_pattern .*\(a\+\)\+"
    )
