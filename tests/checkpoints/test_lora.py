"""Adapters: exactly alpha / r, on their own rows only, from safetensors only."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from acestep.checkpoints import resolve
from acestep.checkpoints.load import load_renderer
from acestep.dit.lora import LoraCache, applied, load_adapter
from acestep.errors import InvalidRequest
from acestep.request import Lora

RANK, ALPHA = 4, 8
CPU, F32 = torch.device("cpu"), torch.float32
ATTENTION = tuple(
    f"layers.{i}.{kind}.{proj}" for i in (0, 1) for kind in ("self_attn", "cross_attn") for proj in ("to_q", "to_v")
)
TARGETS = (*ATTENTION, "layers.0.self_attn.to_out.0", "layers.1.mlp.down_proj", "condition_embedder")
ORIGINAL = {".to_q": ".q_proj", ".to_v": ".v_proj", ".to_out.0": ".o_proj"}


@pytest.fixture(scope="module")
def transformer(home):
    return load_renderer(resolve("tiny-xl", "renderer", root=home.parent), device="cpu", dtype=F32).transformer


def pairs(transformer, seed=0, rank=RANK, targets=TARGETS):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in targets:
        module = transformer.get_submodule(name)
        down = torch.randn(rank, module.in_features, generator=generator) * 0.2
        up = torch.randn(module.out_features, rank, generator=generator) * 0.2
        found[name] = (down, up)
    return found


def original_name(name):
    for new, old in ORIGINAL.items():
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def write_peft(folder, weights, **config):
    """As PEFT saves an adapter that upstream trained on the original DiT."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, (down, up) in weights.items():
        state[f"base_model.model.{original_name(name)}.lora_A.weight"] = down
        state[f"base_model.model.{original_name(name)}.lora_B.weight"] = up
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def inputs(count=3):
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(count, *shape, generator=generator)

    times = torch.rand(count, generator=generator)
    return {
        "hidden_states": noise(20, 8),
        "timestep": times,
        "timestep_r": times,
        "encoder_hidden_states": noise(7, 32),
        "context_latents": noise(20, 16),
    }


@torch.inference_mode()
def run(transformer, **kwargs):
    return transformer(**kwargs, return_dict=False)[0]


def merged(transformer, weights, scale):
    """The reference: a copy of the model with scale · B A added to its weights."""
    model = copy.deepcopy(transformer)
    for name, (down, up) in weights.items():
        factor = scale[name] if isinstance(scale, dict) else scale
        model.get_submodule(name).weight += factor * (up @ down)
    return model


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_equals_merged_weights_at_alpha_over_r(transformer, tmp_path, strength):
    weights = pairs(transformer)
    folder = write_peft(tmp_path / "a", weights)
    active = LoraCache(transformer, CPU, F32).get(Lora(path=str(folder), scale=strength))
    batch = inputs()
    plain = run(transformer, **batch)
    with applied(transformer, [active] * 3):
        ours = run(transformer, **batch)
    assert relative(ours, run(merged(transformer, weights, strength * ALPHA / RANK), **batch)) < 1e-5
    assert (relative(ours, plain) > 0.01) == (strength > 0)


def test_without_alpha_it_would_be_another_song(transformer, tmp_path):
    weights = pairs(transformer)
    active = LoraCache(transformer, CPU, F32).get(Lora(path=str(write_peft(tmp_path / "a", weights))))
    batch = inputs()
    with applied(transformer, [active] * 3):
        ours = run(transformer, **batch)
    assert relative(ours, run(merged(transformer, weights, 1.0), **batch)) > 0.01


def test_rows_do_not_see_each_others_adapters(transformer, tmp_path):
    cache = LoraCache(transformer, CPU, F32)
    first, second = (
        cache.get(Lora(path=str(write_peft(tmp_path / str(seed), pairs(transformer, seed))))) for seed in (1, 2)
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
    active = LoraCache(transformer, CPU, F32).get(Lora(path=str(write_peft(tmp_path / "a", pairs(transformer)))))
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
    active = LoraCache(transformer, CPU, F32).get(Lora(path=str(tmp_path)))
    assert active.adapter.layers["layers.0.self_attn.to_q"].scale == 4.0
    assert active.adapter.layers["layers.0.mlp.down_proj"].scale == 0.75
    batch = inputs()
    with applied(transformer, [active] * 3):
        assert relative(run(transformer, **batch), run(model, **batch)) < 1e-6


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
    adapter = cache.get(Lora(path=str(one))).adapter
    assert cache.get(Lora(path=str(same), scale=0.3)).adapter is adapter
    assert cache.get(None) is None
    # Another alpha is another adapter, even with the same weights; so is a file that was replaced.
    other = cache.get(Lora(path=str(write_peft(tmp_path / "other", weights, lora_alpha=4)))).adapter
    assert other.hash != adapter.hash
    write_peft(one, pairs(transformer, seed=5))
    assert cache.get(Lora(path=str(one))).adapter.hash not in (adapter.hash, other.hash)

    small = LoraCache(transformer, CPU, F32, max_bytes=adapter.bytes)
    for folder in (same, tmp_path / "other", same):
        small.get(Lora(path=str(folder)))
        assert small.bytes == adapter.bytes


def refused(path, transformer, match):
    with pytest.raises(InvalidRequest, match=match) as caught:
        LoraCache(transformer, CPU, F32).get(Lora(path=str(path)))
    assert caught.value.details["field"] == "lora.path"
    return caught.value


def test_pickles_are_never_loaded(transformer, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "executed").mkdir, ()

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, transformer, "pickle")
    refused(tmp_path / "adapter_model.bin", transformer, "pickle")
    (tmp_path / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refused(tmp_path, transformer, "no whole safetensors file")
    refused(tmp_path / "absent", transformer, "holds no")
    assert not (tmp_path / "executed").exists()


def test_what_does_not_fit_is_listed(transformer, tmp_path):
    folder = write_peft(tmp_path / "a", pairs(transformer))
    path = folder / "adapter_model.safetensors"
    good = load_file(path)
    key = "base_model.model.layers.0.self_attn.q_proj"

    def changed(match, **changes):
        state = {**good, **{k.replace("__", "."): v for k, v in changes.items() if v is not None}}
        for name in [k for k, v in changes.items() if v is None]:
            del state[name]
        save_file(state, path)
        return refused(folder, transformer, match)

    wide = changed("layers.0.self_attn.to_q is 64×99, not 64×48", **{f"{key}.lora_A.weight": torch.zeros(RANK, 99)})
    assert wide.details["keys"] == ["layers.0.self_attn.to_q is 64×99, not 64×48"]
    changed("lacks lora_B", **{f"{key}.lora_B.weight": None})
    changed(r"A \(3, 48\) and B \(64, 4\)", **{f"{key}.lora_A.weight": torch.zeros(3, 48)})
    changed("not finite", **{f"{key}.lora_A.weight": torch.full((RANK, 48), float("nan"))})
    extra = {
        "base_model.model.layers.77.self_attn.q_proj.lora_A.weight": torch.zeros(RANK, 48),
        "base_model.model.layers.77.self_attn.q_proj.lora_B.weight": torch.zeros(64, RANK),
    }
    changed("no linear layer layers.77.self_attn.to_q", **extra)
    changed("no LoRA of this model: magnitude", magnitude=torch.zeros(3))
    save_file({"x": torch.zeros(1)}, path)
    refused(folder, transformer, "x")
    save_file({}, path)
    refused(folder, transformer, "no LoRA weights")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm_out"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_alpha": "loud"}, "lora_alpha"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(config, match, transformer, tmp_path):
    refused(write_peft(tmp_path, pairs(transformer), **config), transformer, match)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_broken_config_is_an_error(text, transformer, tmp_path):
    write_peft(tmp_path, pairs(transformer))
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path, transformer, "config")
