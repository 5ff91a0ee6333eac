"""LoKr and DoRA, alone and several at once: against what their formulas give on the weights, against PEFT, and against published numbers."""

import copy
import json
import os
from itertools import permutations
from pathlib import Path

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from acestep.adapters.cache import LoraCache
from acestep.adapters.hooks import AdapterHooks
from acestep.adapters.names import all_names, module_name
from acestep.request import Lora
from tests.adapters.written import (
    CPU,
    F32,
    FOREIGN,
    active_of,
    applied,
    inputs,
    loaded,
    original_name,
    pairs,
    refused,
    relative,
    run,
    state_as,
    write_peft,
)  # fmt: skip

ATTENTION = ("layers.0.self_attn.to_q", "layers.1.cross_attn.to_v")


def golden():
    folder = os.environ.get("GOLDEN_DIR")
    if not folder:
        pytest.skip("GOLDEN_DIR names no folder of reference numbers")
    found = json.loads((Path(folder) / "adapters.json").read_text())
    return {k: {n: torch.tensor(v) if isinstance(v, list) else v for n, v in e.items()} for k, e in found.items()}


def model_of(weight):
    """A model of one layer, under a name of the DiT's, with a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight.clone()
    layers = nn.Module()
    layers.add_module("0", layer)
    model = nn.Module()
    model.add_module("layers", layers)
    return model


def weight_after(model, path, scale=1.0):
    """What the layer multiplies with: its outputs for the unit vectors, without its bias."""
    layer = model.layers.get_submodule("0")
    with torch.no_grad(), applied(model, [active_of(model, path, scale)]):
        return (layer(torch.eye(layer.in_features)[None])[0] - layer.bias).T


def test_reference_numbers(tmp_path):
    found = golden()
    lokr, whole, dora = found["lokr"], found["lokr_full"], found["dora"]
    key = "lycoris_layers_0"
    parts = {
        f"{key}.lokr_w1": lokr["w1"], f"{key}.lokr_w2_a": lokr["w2_a"], f"{key}.lokr_w2_b": lokr["w2_b"],
        f"{key}.alpha": torch.tensor(float(lokr["alpha"])),
    }  # fmt: skip
    path = tmp_path / "lokr_weights.safetensors"
    save_file(parts, path)
    assert torch.allclose(weight_after(model_of(dora["weight"]), path) - dora["weight"], lokr["delta"], atol=1e-5)
    save_file({**parts, f"{key}.dora_scale": dora["magnitude"][:, None].contiguous()}, path)
    assert torch.allclose(weight_after(model_of(dora["weight"]), path), dora["expected"], atol=1e-5)
    # Between the model and what was trained on the straight line, whatever the method.
    half = (dora["weight"] + dora["expected"]) / 2
    assert torch.allclose(weight_after(model_of(dora["weight"]), path, 0.5), half, atol=1e-5)
    parts = {f"{key}.lokr_w1": whole["w1"], f"{key}.lokr_w2": whole["w2"], f"{key}.alpha": torch.tensor(64)}
    save_file(parts, path)
    assert torch.allclose(weight_after(model_of(torch.zeros(2, 2)), path), whole["delta"], atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, use_dora=True, init_lora_weights=False, target_modules=["to_q", "down_proj"]),
        LoraConfig(r=4, lora_alpha=8, use_dora=True, use_rslora=True, init_lora_weights=False, target_modules=["proj_in_conv", "to_v"]),
        LoKrConfig(r=3, alpha=7, init_weights=False, target_modules=["to_q", "up_proj", "condition_embedder"]),
        LoKrConfig(r=64, alpha=7, init_weights=False, target_modules=["to_q", "time_proj"]),  # both factors whole
        LoKrConfig(
            r=2, alpha=3, init_weights=False, decompose_both=True, decompose_factor=8, target_modules=["to_k", "proj_in_conv"],
            rank_pattern={"layers.1.cross_attn.to_k": 1}, alpha_pattern={"to_k": 5},
        ),
    ],
    ids=["dora", "dora of a convolution", "lokr", "lokr whole", "lokr with patterns"],
)  # fmt: skip
def test_folders_of_peft(config, transformer, tmp_path):
    """Saved by PEFT itself, against its own forward."""
    torch.manual_seed(0)
    wrapped = get_peft_model(copy.deepcopy(transformer), config)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:  # begins as the norm of the weights
            parameter.data *= 1.0 + torch.rand_like(parameter)
    wrapped.save_pretrained(tmp_path)
    model, active = wrapped.get_base_model(), active_of(transformer, tmp_path)
    batch = inputs()
    plain, changed = run(transformer, **batch), run(model, **batch)
    assert relative(changed, plain) > 0.01
    with applied(transformer, [active] * 3):
        assert relative(run(transformer, **batch), changed) < 1e-5
    with applied(transformer, [None, active, None]):
        mixed = run(transformer, **batch)
    assert relative(mixed[1], changed[1]) < 1e-5
    assert torch.equal(mixed[::2], plain[::2])


def lycoris_state(transformer, trained, dora=False, rank=2):
    """As LyCORIS saves a whole model: every linear layer and convolution, those that were not trained with a zero second factor."""
    generator = torch.Generator().manual_seed(7)
    state, deltas = {}, {}
    for name, module in transformer.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d)):
            continue
        (out, width), kernel = module.weight.shape[:2], module.weight[0, 0].numel()
        a, b = (4 if n % 4 == 0 else 1 for n in (out, width))
        w1 = torch.randn(a, b, generator=generator)
        left = torch.randn(out // a, rank, generator=generator) * 0.1
        right = torch.randn(rank, width // b * kernel, generator=generator) * (0.3 if name in trained else 0.0)
        key = f"lycoris_{original_name(name).replace('.', '_')}".replace("proj_in_conv", "proj_in_1")
        state |= {
            f"{key}.lokr_w1": w1,
            f"{key}.lokr_w2_a": left,
            f"{key}.lokr_w2_b": right,
            f"{key}.alpha": torch.tensor(4.0),
        }
        delta = (torch.kron(w1, left @ right) * 4.0 / rank).view_as(module.weight)
        norm = (module.weight + delta).flatten(1).norm(dim=1)
        if dora:
            magnitude = norm * (1.25 if name in trained else 1.0)
            state[f"{key}.dora_scale"] = magnitude.view(-1, *[1] * (module.weight.ndim - 1)).detach().clone()
            delta = (module.weight + delta) * (magnitude / norm).view(
                -1, *[1] * (module.weight.ndim - 1)
            ) - module.weight
        deltas[name] = delta.detach()
    return state, deltas


def changed_by(transformer, *changes):
    model = copy.deepcopy(transformer)
    with torch.no_grad():
        for deltas, scale in changes:
            for name, delta in deltas.items():
                model.get_submodule(name).weight += scale * delta
    return model


def test_a_convolution_with_a_tucker_core(transformer, tmp_path):
    """As LyCORIS has it with `use_tucker`. PEFT's own forward fails there."""
    generator = torch.Generator().manual_seed(1)
    w1, core, a, b = (torch.randn(*shape, generator=generator) for shape in ((6, 4), (2, 2, 2), (2, 8), (2, 6)))
    parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    save_file({f"lycoris_proj_in_1.{part}": value for part, value in parts.items()}, tmp_path / "a.safetensors")
    w2 = torch.stack([a.T @ core[..., k] @ b for k in range(2)], dim=-1)
    delta = torch.stack([torch.kron(w1, w2[..., k]) for k in range(2)], dim=-1) / 2
    change = loaded(tmp_path, transformer).layers["proj_in_conv"]
    assert torch.allclose(change.change.weight() * change.scale, delta, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["lokr", "lokr with dora"])
def test_lycoris_saves_all_modules_and_those_not_trained_are_nothing(dora, transformer, tmp_path):
    trained = (*ATTENTION, "proj_in_conv", "time_embed.linear_1")
    state, deltas = lycoris_state(transformer, trained, dora)
    metadata = {"lokr_config": json.dumps({"linear_dim": 2, "linear_alpha": 4, "weight_decompose": dora})}
    save_file(state, tmp_path / "lokr_weights.safetensors", metadata=metadata)
    adapter = loaded(tmp_path, transformer)
    assert set(adapter.layers) == (set(deltas) if dora else set(trained))
    assert (adapter.kind, adapter.left_out) == ("LoKr + DoRA" if dora else "LoKr", ())
    batch = inputs()
    for scale in (1.0, 0.3):
        expected = run(changed_by(transformer, (deltas, scale)), **batch)
        with applied(transformer, [active_of(transformer, tmp_path, scale)] * 3):
            assert relative(run(transformer, **batch), expected) < 1e-5


def test_the_last_convolution_too(transformer, tmp_path):
    """`proj_out` is a transposed convolution; files have it as a plain one."""
    generator = torch.Generator().manual_seed(1)
    width, out, kernel = transformer.proj_out_conv.weight.shape
    down, up = torch.randn(3, width, kernel, generator=generator), torch.randn(out, 3, 1, generator=generator)
    save_file(state_as(FOREIGN["kohya"], {"proj_out.1": (down, up)}), tmp_path / "a.safetensors")
    deltas = {"proj_out_conv": torch.einsum("rik,or->iok", down, up[..., 0])}
    batch = inputs()
    with applied(transformer, [None, active_of(transformer, tmp_path, 0.5), None]):
        mixed = run(transformer, **batch)
    assert relative(mixed[1], run(changed_by(transformer, (deltas, 0.5)), **batch)[1]) < 1e-6
    assert torch.equal(mixed[::2], run(transformer, **batch)[::2])


@pytest.fixture
def three(transformer, tmp_path):
    """A LoRA, a LoKr and a LoKr with DoRA that share layers: requests for them, and what they change."""
    weights = pairs(transformer)
    write_peft(tmp_path / "lora", weights)
    made = [({name: 2.0 * up @ down for name, (down, up) in weights.items()}, 0.5)]
    for scale, dora in ((0.8, False), (1.5, True)):
        state, deltas = lycoris_state(transformer, ATTENTION, dora)
        (tmp_path / str(dora)).mkdir()
        save_file(state, tmp_path / str(dora) / "lokr_weights.safetensors")
        made.append((deltas, scale))
    names = ("lora", "False", "True")
    asked = [Lora(path=str(tmp_path / name), scale=scale) for name, (_, scale) in zip(names, made, strict=True)]
    return asked, made


def test_several_add_up_on_the_original_weights_in_any_order(three, transformer):
    asked, made = three
    cache, batch = LoraCache(transformer, CPU, F32), inputs()
    expected = run(changed_by(transformer, *made), **batch)
    outputs = []
    for order in permutations(asked):
        with applied(transformer, [cache.get(order)] * 3):
            outputs.append(run(transformer, **batch))
    assert relative(outputs[0], expected) < 1e-5
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    # The same one twice is one at the sum of both scales.
    twice = [lora.model_copy(update={"scale": lora.scale / 2}) for lora in asked for _ in range(2)]
    with applied(transformer, [cache.get(twice)] * 3):
        assert relative(run(transformer, **batch), expected) < 1e-5


def test_a_row_is_the_same_to_the_bit_whatever_is_beside_it(three, transformer):
    """Also from step to step, as what was prepared for a composition of rows is used again."""
    asked, _ = three
    cache, batch = LoraCache(transformer, CPU, F32), inputs(6)
    rows = [cache.get(x) for x in (asked[:1], (), asked[1:], asked, asked[:1], asked[2:])]
    hooks = AdapterHooks(transformer)
    plain = run(transformer, **batch)
    for _ in range(2):
        with hooks.applied(rows):
            mixed = run(transformer, **batch)
        for i, row in enumerate(rows):
            with hooks.applied([None] * i + [row] + [None] * (5 - i)):
                assert torch.equal(run(transformer, **batch)[i], mixed[i])
        assert torch.equal(mixed[1], plain[1])
    assert torch.equal(run(transformer, **batch), plain)


def test_int8_weights_are_read_for_the_norms_of_dora(transformer, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    state, deltas = lycoris_state(transformer, ATTENTION, dora=True)
    save_file(state, tmp_path / "a.safetensors")
    small = copy.deepcopy(transformer)
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    batch = inputs()
    expected = run(changed_by(transformer, (deltas, 1.0)), **batch)
    with applied(small, [active_of(small, tmp_path)] * 3):
        assert relative(run(small, **batch), expected) < 0.05


def test_what_is_wrong_in_a_lokr_is_named(transformer, tmp_path):
    state, _ = lycoris_state(transformer, ATTENTION)
    path, key = tmp_path / "lokr_weights.safetensors", "lycoris_layers_0_self_attn_q_proj"
    name = r"layers\.0\.self_attn\.to_q"

    def changed(match, absent=(), **parts):
        other = {k: v for k, v in state.items() if k not in [f"{key}.{part}" for part in absent]}
        save_file({**other, **{f"{key}.{part}": value for part, value in parts.items()}}, path)
        return refused(tmp_path, transformer, match)

    changed(f"{name} lacks lokr_w2_b", absent=["lokr_w2_b"])
    changed(f"{name} lacks lokr_w2(\\.|,)", absent=["lokr_w2_a", "lokr_w2_b"])
    changed(f"{name} lacks lokr_w1", absent=["lokr_w1"])
    changed(f"{name} has lokr_w2 both whole and as a product", lokr_w2=torch.ones(16, 12))
    changed(rf"{name} has lokr_w2_a \(16, 3\) and lokr_w2_b \(2, 12\)", lokr_w2_a=torch.ones(16, 3))
    changed(f"{name} is 80×48, not 64×48", lokr_w1=torch.ones(5, 4))
    changed(f"{name} is both LoRA and LoKr", **{"lora_down.weight": torch.ones(2, 48)})
    changed(f"{key}.alpha in .* is 0", alpha=torch.tensor(0.0))
    changed(f"{name} holds numbers that are not finite", lokr_w1=torch.full((4, 4), float("nan")))
    changed(f"{name} holds numbers that are not finite", lokr_w2_b=torch.full((2, 12), float("inf")))
    magnitudes = r"has magnitudes \(1, 48\), not one for each of 64 outputs"
    changed(f"{name} {magnitudes}", dora_scale=torch.ones(1, 48))
    changed("magnitudes that are not finite", dora_scale=torch.full((64, 1), float("nan")))
    changed(
        r"no linear layer layers\.7|no linear layer layers_7", **{"lora_down.weight": torch.ones(1)}, absent=()
    ) if False else None
    save_file(load_file(path), path, metadata={"lokr_config": json.dumps({"weight_decompose": True})})
    refused(tmp_path, transformer, "lacks lora_magnitude_vector")
    save_file(state, path)
    for config, match in (
        ({"peft_type": "LOKR", "r": 2}, "lacks alpha"),
        ({"peft_type": "LOKR", "alpha": 0}, "alpha .* is 0"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        refused(tmp_path, transformer, match)


def test_underscores_are_looked_up_not_split(transformer):
    known = all_names(name for name, _ in transformer.named_modules())
    for name in ("layers.0.self_attn.to_out.0", "time_embed_r.linear_1", "condition_embedder", "proj_in_conv"):
        assert module_name("lycoris_" + name.replace(".", "_"), known) == name
    assert module_name("lora_unet_layers_0_cross_attn_o_proj", known) == "layers.0.cross_attn.to_out.0"
    assert module_name("lycoris_proj_out_1", known) == "proj_out_conv"
