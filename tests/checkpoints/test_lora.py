"""Adapters: exactly alpha / r, on their own rows only, from safetensors only."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from acestep.checkpoints import resolve
from acestep.checkpoints.load import load_renderer
from acestep.dit.lora import LoraCache, _aliases, _module_name, _names, applied, load_adapter
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


@pytest.mark.parametrize("writer", ["peft", "diffusers"])
def test_folders_as_libraries_write_them(writer, transformer, tmp_path):
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
        model.add_adapter(config)
        model.save_lora_adapter(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    active = LoraCache(transformer, CPU, F32).get(Lora(path=str(tmp_path)))
    batch = inputs()
    plain, changed = run(transformer, **batch), run(model, **batch)
    assert relative(changed, plain) > 0.01
    with applied(transformer, [active] * 3):
        assert relative(run(transformer, **batch), changed) < 1e-6


def test_no_name_of_the_model_is_foreign_or_shared(transformer):
    names = [name for name, _ in transformer.named_modules()]
    known = _names(transformer)
    for name in names[1:]:
        assert [_module_name(alias.replace(".", joint), known) for alias in _aliases(name) for joint in "._"] == [
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


FOREIGN = {
    "peft": "base_model.model.{}.lora_A.weight",
    "peft with the adapter's name": "base_model.model.{}.lora_A.jazz.weight",
    "comfy": "diffusion_model.decoder.{}.lora_A.weight",
    "diffusers": "transformer.{}.lora.down.weight",
    "compiled": "base_model.model._orig_mod.decoder.{}.lora_A.weight",
    "kohya": "lora_unet_{_}.lora_down.weight",
    "kohya of the whole model": "lora_unet_decoder_{_}.lora_down.weight",
    "lycoris": "lycoris_{_}.lora_down.weight",
    "flat diffusers": "lora_transformer_{_}.lora_down.weight",
}
UP = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}


def state_as(form, weights, naming=original_name):
    """The weights under the keys of one of `FOREIGN`."""
    state = {}
    for name, (down, up) in weights.items():
        known = naming(name)
        key = form.replace("{}", known).replace("{_}", known.replace(".", "_"))
        first, second = next(pair for pair in UP.items() if pair[0] in key)
        state[key], state[key.replace(first, second)] = down, up
    return state


def loaded(path, transformer, dtype=F32):
    return load_adapter(path, transformer, device=CPU, dtype=dtype)


def same(adapter, weights, scale=1.0):
    assert set(adapter.layers) == set(weights)
    for name, (down, up) in weights.items():
        layer = adapter.layers[name]
        assert torch.equal(layer.down, down)
        assert torch.equal(layer.up, up)
        assert layer.scale == scale


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
    active = LoraCache(transformer, CPU, F32).get(Lora(path=str(tmp_path)))
    batch = inputs()
    plain, changed = run(transformer, **batch), run(model, **batch)
    with applied(transformer, [active] * 3):
        assert relative(run(transformer, **batch), changed) < 1e-6
    with applied(transformer, [None, active, None]):
        mixed = run(transformer, **batch)
    assert relative(mixed[1], changed[1]) < 1e-6
    assert relative(mixed[::2], plain[::2]) < 1e-6


def test_what_is_not_of_the_dit_is_left_out_and_named(transformer, tmp_path):
    weights = pairs(transformer)
    state = state_as(FOREIGN["kohya"], weights)
    state |= state_as("lora_{_}.lora_down.weight", {"te.layers.0.mlp.fc1": (torch.ones(4, 8), torch.ones(8, 4))})
    state["lora_te_layers_0_mlp_fc1.alpha"] = torch.tensor(4.0)
    state |= state_as(FOREIGN["kohya"], {"proj_out.1": (torch.ones(4, 48, 2), torch.ones(8, 4, 1))})
    save_file(state, tmp_path / "k.safetensors")
    adapter = loaded(tmp_path, transformer)
    same(adapter, weights)
    assert adapter.left_out == ("proj_out_conv", "te_layers_0_mlp_fc1")
    # The greater part of it, or any layer of the DiT, is another model's adapter.
    foreign = {f"encoder.layers.{i}.q_proj": (torch.ones(4, 8), torch.ones(8, 4)) for i in range(len(weights))}
    save_file(state_as(FOREIGN["peft"], {**weights, **foreign}), tmp_path / "k.safetensors")
    refused(tmp_path, transformer, "greater part no LoRA of this renderer's DiT: encoder.layers.0.to_q")
    deeper = {**weights, "layers.9.mlp.up_proj": (torch.ones(4, 48), torch.ones(96, 4))}
    save_file(state_as(FOREIGN["kohya"], deeper), tmp_path / "k.safetensors")
    refused(tmp_path, transformer, "no linear layer layers_9_mlp_up_proj")


@pytest.mark.parametrize(
    ("part", "method"),
    [
        ("lokr_w1", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lora_E", "AdaLoRA"),
    ],
)
def test_other_methods_are_refused_in_one_sentence(part, method, transformer, tmp_path):
    state = {f"lycoris_layers_0_self_attn_q_proj.{part}": torch.ones(2, 2)}
    state |= state_as(FOREIGN["peft"], pairs(transformer))
    save_file(state, tmp_path / "lokr_weights.safetensors")
    refused(tmp_path, transformer, f" is {method}; only LoRA is supported.$")


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_other_types_are_converted(stored, transformer, tmp_path):
    weights = {name: (a.to(stored), b.to(stored)) for name, (a, b) in pairs(transformer).items()}
    save_file(state_as(FOREIGN["peft"], weights), tmp_path / "a.safetensors")
    same(loaded(tmp_path, transformer), {name: (a.to(F32), b.to(F32)) for name, (a, b) in weights.items()})


def test_numbers_that_do_not_fit_are_named(transformer, tmp_path):
    weights = pairs(transformer)
    good = state_as(FOREIGN["kohya"], weights)
    module = "lora_unet_layers_0_self_attn_q_proj"

    def changed(match, dtype=F32, **changes):
        save_file({**good, **{f"{module}.{k}": v for k, v in changes.items()}}, tmp_path / "a.safetensors")
        with pytest.raises(InvalidRequest, match=match):
            loaded(tmp_path, transformer, dtype)

    changed("not finite in float16", torch.float16, **{"lora_down.weight": torch.full((RANK, 48), 1e6)})
    changed("is int8, not one of bfloat16, float16", **{"lora_down.weight": torch.ones((RANK, 48), dtype=torch.int8)})
    changed(
        "is float4", **{"lora_down.weight": torch.zeros((RANK, 24), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    )
    changed(r"A \(\)", **{"lora_down.weight": torch.tensor(1.0)})
    changed(r"A \(4, 48, 1\)", **{"lora_down.weight": torch.ones(RANK, 48, 1)})
    changed(r"B \(64,\)", **{"lora_up.weight": torch.ones(64)})
    for alpha in (torch.ones(2), torch.tensor(float("nan")), torch.ones(0), torch.ones(1, dtype=torch.complex64)):
        changed(f"{module}.alpha in .* is not one finite number", alpha=alpha)
    twice = {"layers.0.self_attn.to_q.lora_A.weight": weights["layers.0.self_attn.to_q"][0].clone()}
    save_file({**good, **twice}, tmp_path / "a.safetensors")
    refused(tmp_path, transformer, "more than one adapter")


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
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"alpha_pattern": {"to_q": "loud"}}, "to_q .* 'loud'"),
        ({"lora_alpha": "loud"}, "lora_alpha"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(config, match, transformer, tmp_path):
    refused(write_peft(tmp_path, pairs(transformer), **config), transformer, match)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_broken_config_is_an_error(text, transformer, tmp_path):
    write_peft(tmp_path, pairs(transformer))
    (tmp_path / "adapter_config.json").write_text(text)
    refused(tmp_path, transformer, "config")
