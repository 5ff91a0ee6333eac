"""Adapters of the planner: what they add is what their merged weights would give, for the songs that ask and for no other."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from company import written_among
from oracle import Oracle
from safetensors.torch import save_file

from acestep.errors import InvalidOutput, InvalidRequest
from acestep.lm.adapters import PlannerAdapters, RowAdapters
from acestep.lm.decoder import Decoder
from acestep.lm.grammar import CodesProgram, Grammar
from acestep.lm.job import Job
from acestep.lm.model import PlannerModel
from acestep.lm.planner import Planner
from acestep.lm.sampling import SamplingParams
from acestep.lm.work import PlanWork
from acestep.plan import Plan
from acestep.request import Lora, SongRequest
from acestep.stage_settings import PlannerSettings

MIB = 1 << 20
RANK = 3
MODULES = [
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


def write(
    folder: Path, oracle: Oracle, seed: int, *, modules: list[str] = MODULES, size: float = 0.3, **config: Any
) -> Path:
    """As PEFT saves an adapter of a Qwen3."""
    folder.mkdir(parents=True)
    generator, state = torch.Generator().manual_seed(seed), {}
    for name in modules:
        weight = oracle.model.model.get_submodule(name).weight
        key = f"base_model.model.model.{name}"
        state[f"{key}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator) * size
        state[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator) * size
        if config.get("use_dora"):
            state[f"{key}.lora_magnitude_vector"] = weight.norm(dim=1) * (
                1 + torch.rand(len(weight), generator=generator)
            )
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "bias": "none", **config})
    )
    return folder


def merged(checkpoint: Path, grammar: Grammar, *adapters: tuple[Path, float]) -> Oracle:
    """The naive planner with the adapters in its weights, by the papers' formulas."""
    from safetensors.torch import load_file

    oracle, plain = Oracle(checkpoint, grammar), Oracle(checkpoint, grammar)
    for folder, strength in adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        state = load_file(folder / "adapter_model.safetensors")
        scale = 2 / RANK**0.5 if config.get("use_rslora") else 2 / RANK
        for name in {key.split(".lora_")[0].removeprefix("base_model.model.model.") for key in state}:
            key = f"base_model.model.model.{name}"
            weight = plain.model.model.get_submodule(name).weight.data
            trained = weight + scale * state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
            if config.get("use_dora"):
                trained *= (state[f"{key}.lora_magnitude_vector"] / trained.norm(dim=1))[:, None]
            oracle.model.model.get_submodule(name).weight.data += strength * (trained - weight)
    return oracle


@pytest.fixture(scope="module")
def plain(checkpoint: Path, grammar: Grammar) -> Oracle:
    return Oracle(checkpoint, grammar)


@pytest.fixture(scope="module")
def files(plain: Oracle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lm-loras")
    return {
        "lora": write(folder / "lora", plain, 1),
        "rslora": write(folder / "rslora", plain, 2, modules=MODULES[2:9], use_rslora=True),
        "dora": write(folder / "dora", plain, 3, use_dora=True),
    }


SONGS: list[list[tuple[str, float]]] = [
    [], [("lora", 1.0)], [("rslora", 0.7)], [("dora", 1.0)], [("dora", 0.5), ("lora", 1.5)], [],
]  # fmt: skip


def loaded(adapters: PlannerAdapters, files: dict[str, Path], names: list[tuple[str, float]]) -> RowAdapters | None:
    return adapters.get([Lora(path=str(files[name]), scale=scale) for name, scale in names])


def test_songs_with_and_without_adapters_in_one_batch_equal_merged_weights(
    either_decoder: Decoder, model: PlannerModel, grammar: Grammar, checkpoint: Path, files: dict[str, Path]
) -> None:
    t = grammar.tokenizer
    adapters = PlannerAdapters(model, MIB)
    prompt, uncond = t.encode("A calm piano and drums"), t.encode("NO USER INPUT")
    params = SamplingParams(0.85, top_p=0.95, cfg_scale=2.0)

    def program() -> CodesProgram:
        return CodesProgram(t, 20, limit=20)

    jobs = []
    for number, names in enumerate(SONGS):
        job = Job(prompt, uncond, [(program(), 5)], params)
        job.adapters = loaded(adapters, files, names)
        jobs.append(job)
        either_decoder.add(job)
        if number % 2:
            either_decoder.step()
    while either_decoder.jobs:
        either_decoder.step()
    for job, names in zip(jobs, SONGS, strict=True):
        oracle = merged(checkpoint, grammar, *((files[name], scale) for name, scale in names))
        assert job.outputs[0].written == oracle.decode(prompt, uncond, program(), 5, params), names
    written = [tuple(job.outputs[0].written) for job in jobs]
    assert written[0] == written[-1]
    assert len(set(written)) == len(SONGS) - 1  # each adapter does something


@pytest.mark.parametrize("names", [[], [("lora", 1.0)], [("dora", 0.5), ("lora", 1.5)]])
def test_a_song_is_the_same_to_the_last_bit_alone_and_among_adapters(
    names: list[tuple[str, float]], decoder: Decoder, model: PlannerModel, grammar: Grammar, files: dict[str, Path]
) -> None:
    if decoder.invariant_rows is None:
        pytest.skip("this machine's matrix products depend on the batch")
    t, rng = grammar.tokenizer, random.Random(3)
    adapters = PlannerAdapters(model, MIB)

    def other(number: int) -> Job:
        words = [rng.randrange(t.text_size) for _ in range(rng.choice([3, 20, 600]))]
        job = Job(words, None, [(CodesProgram(t, rng.randint(1, 40), limit=40), number)], SamplingParams())
        job.adapters = loaded(adapters, files, rng.choice(SONGS))
        return job

    def run(company: int) -> tuple[list[int], torch.Tensor]:
        program, params = CodesProgram(t, 20, limit=20), SamplingParams(cfg_scale=2.0)
        job = Job(t.encode("A song"), t.encode("NO"), [(program, 11)], params)
        job.adapters = loaded(adapters, files, names)
        return written_among(decoder, job, map(other, range(company)))

    alone, states = run(0)
    for company in (1, 4, 9):
        together, others = run(company)
        assert together == alone
        assert torch.equal(others, states)


def test_the_files_of_a_batch_item_share_a_prompt_under_their_adapter(
    decoder: Decoder, model: PlannerModel, grammar: Grammar, checkpoint: Path, files: dict[str, Path]
) -> None:
    t = grammar.tokenizer
    job = Job(t.encode("A song"), None, [(CodesProgram(t, 9, limit=9), s) for s in (1, 2, 3)], SamplingParams())
    job.adapters = loaded(PlannerAdapters(model, MIB), files, [("lora", 1.0)])
    decoder.add(job)
    while decoder.jobs:
        decoder.step()
    oracle = merged(checkpoint, grammar, (files["lora"], 1.0))
    for output, seed in zip(job.outputs, (1, 2, 3), strict=True):
        assert output.written == oracle.decode(job.prompt, None, CodesProgram(t, 9, limit=9), seed, job.params)


def test_numbers_that_overflow_end_their_own_song_only(
    either_decoder: Decoder, model: PlannerModel, grammar: Grammar, plain: Oracle, tmp_path: Path
) -> None:
    t = grammar.tokenizer
    wild = {"wild": write(tmp_path / "wild", plain, 4, size=1e18)}
    prompt = t.encode("A song")
    bad, good = (Job(prompt, None, [(CodesProgram(t, 9, limit=9), 1)], SamplingParams()) for _ in range(2))
    bad.adapters = loaded(PlannerAdapters(model, MIB), wild, [("wild", 4.0)])
    either_decoder.add(bad)
    either_decoder.add(good)
    finished = []
    while either_decoder.jobs:
        finished += either_decoder.step()
    assert finished == [bad, good]
    assert isinstance(bad.error, InvalidOutput)
    assert good.error is None
    assert good.outputs[0].written == plain.decode(prompt, None, CodesProgram(t, 9, limit=9), 1, SamplingParams())
    assert either_decoder.arena.reserved_bytes == 0
    assert all(bool(store.isfinite().all()) for store in either_decoder.arena.keys) or not either_decoder._static


@pytest.fixture(scope="module")
def planner(checkpoint: Path) -> Iterator[Planner]:
    planner = Planner.load(checkpoint, PlannerSettings(slots=12, max_len=1_024))
    yield planner
    planner.close()


def request(**fields: Any) -> SongRequest:
    known = {"bpm": 120, "key_scale": "A minor", "time_signature": "4", "duration": 10}
    return SongRequest(prompt="calm piano", seed=7, **known, **fields)


def planned(planner: Planner, **fields: Any) -> Plan:
    plan = planner.submit(PlanWork(request(**fields))).result()
    assert isinstance(plan, Plan)
    return plan


def test_a_plan_names_what_it_was_made_with(planner: Planner, files: dict[str, Path]) -> None:
    several = [{"path": str(files["lora"]), "scale": 0.5}, {"path": str(files["dora"])}]
    without, adapted, turned = (
        planned(planner),
        planned(planner, lm_lora=several),
        planned(planner, lm_lora=several[::-1]),
    )
    assert {(one.name, one.kind, one.scale) for one in adapted.lm_lora} == {
        ("lora", "LoRA", 0.5),
        ("dora", "LoRA + DoRA", 1.0),
    }
    assert all(len(one.hash) == 64 for one in adapted.lm_lora)
    assert without.lm_lora == ()
    assert adapted.codes != without.codes
    assert adapted.codes == turned.codes
    off = planned(planner, lm_lora={"path": str(files["lora"]), "scale": 0})
    assert (off.codes, off.lm_lora) == (without.codes, ())
    assert request(plan=adapted).plan == adapted.model_copy(update={"adjustments": ()})


def test_a_wild_adapter_fails_its_song_and_the_planner_goes_on(
    planner: Planner, plain: Oracle, files: dict[str, Path], tmp_path: Path
) -> None:
    wild = write(tmp_path / "wild", plain, 4, size=1e18)
    expected = planned(planner).codes
    works = [
        request(lm_lora={"path": str(wild), "scale": 4}, batch_size=2),
        request(),
        request(lm_lora={"path": str(files["lora"])}),
    ]
    bad, *good = [planner.submit(PlanWork(work)) for work in works]
    with pytest.raises(InvalidOutput, match="lm_lora: ") as caught:
        bad.result()
    assert caught.value.details["field"] == "lm_lora"
    first, second = (ticket.result() for ticket in good)
    assert isinstance(first, Plan)
    assert isinstance(second, Plan)
    assert first.codes == expected
    assert second.codes == planned(planner, lm_lora={"path": str(files["lora"])}).codes != expected
    assert planner.stats()["slots_used"] == 0


WRONG: list[tuple[str, Callable[[Path, Oracle], object], str]] = [
    ("none", lambda path, oracle: path.mkdir(), "holds no .safetensors file"),
    ("head", lambda path, oracle: write_head(path, oracle), "changes more than the decoder's layers: lm_head"),
    ("nan", lambda path, oracle: write(path, oracle, 1, size=float("nan")), "not finite"),
    ("pissa", lambda path, oracle: write(path, oracle, 1, init_lora_weights="pissa"), "changed weights"),
    ("renderer's", lambda path, oracle: write_foreign(path), "does not fit this planner: .*no linear layer layers.0.cross_attn"),
    ("broken", lambda path, oracle: write(path, oracle, 1).joinpath("adapter_model.safetensors").write_bytes(b"x"), "no whole"),
]  # fmt: skip


def write_head(path: Path, oracle: Oracle) -> None:
    write(path, oracle, 1)
    from safetensors.torch import load_file

    state = load_file(path / "adapter_model.safetensors")
    state["base_model.model.lm_head.lora_A.weight"] = torch.ones(1, 4)
    state["base_model.model.lm_head.lora_B.weight"] = torch.ones(4, 1)
    save_file(state, path / "adapter_model.safetensors")


def write_foreign(path: Path) -> None:
    path.mkdir()
    state = {
        "layers.0.cross_attn.q_proj.lora_A.weight": torch.ones(2, 8),
        "layers.0.cross_attn.q_proj.lora_B.weight": torch.ones(8, 2),
    }
    save_file(state, path / "adapter_model.safetensors")


@pytest.mark.parametrize(("name", "make", "text"), WRONG, ids=[name for name, _, _ in WRONG])
def test_what_cannot_be_used_is_refused_by_name(
    name: str, make: Callable[[Path, Oracle], object], text: str, planner: Planner, plain: Oracle, tmp_path: Path
) -> None:
    make(tmp_path / name, plain)
    with pytest.raises(InvalidRequest, match=text) as caught:
        planned(planner, lm_lora={"path": str(tmp_path / name)})
    assert caught.value.message.startswith("lm_lora: ")
    assert caught.value.details["field"] == "lm_lora.path"


def test_adapters_in_flight_and_kept_have_a_bound(model: PlannerModel, files: dict[str, Path]) -> None:
    sizes = PlannerAdapters(model, MIB)
    lora, dora = (loaded(sizes, files, [(name, 1.0)]) for name in ("lora", "dora"))
    assert lora is not None
    assert dora is not None
    bytes_of = {name: sum(a.bytes for a in row.adapters) for name, row in (("lora", lora), ("dora", dora))}
    tight = PlannerAdapters(model, max(bytes_of.values()))
    first, second = (loaded(tight, files, [(name, 1.0)]) for name in ("lora", "dora"))
    assert first is not None
    assert second is not None
    assert tight.fit([], second)
    assert tight.fit([first], first)
    assert not tight.fit([first], second)
    assert tight._cache.bytes <= tight.max_bytes
    with pytest.raises(InvalidRequest, match="lm_lora: the adapters take"):
        loaded(tight, files, [("lora", 1.0), ("dora", 1.0)])
