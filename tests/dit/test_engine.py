"""The engine between callers: cancelling, deadlines, order, poison, memory, streaming, offload and int8."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acestep.dit import sources
from acestep.dit.denoiser import Row
from acestep.dit.renderer import Renderer
from acestep.dit.residency import Residency
from acestep.dit.work import Rendered, RenderWork
from acestep.errors import Cancelled, DeadlineExceeded, InvalidOutput, InvalidRequest, OutOfMemory, Unavailable
from acestep.request import Lora, SongRequest
from acestep.song import Progress
from acestep.worker import Ticket

Make = Callable[..., Renderer]


def work_of(**fields: Any) -> RenderWork:
    return RenderWork(SongRequest(**{"prompt": "p", "duration": 10, "seed": 1, "steps": 3, **fields}))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.002)


class Gate:
    """Lets a renderer's engine make one step at a time, when told."""

    def __init__(self, renderer: Renderer) -> None:
        engine: Any = renderer._thread.engine
        self._step, self._permits, self.steps = engine.step, threading.Semaphore(0), 0
        engine.step = self._gated

    def _gated(self) -> bool:
        self._permits.acquire()
        try:
            return self._step()
        finally:
            self.steps += 1

    def let(self, steps: int = 1) -> None:
        before = self.steps
        for _ in range(steps):
            self._permits.release()
        wait_until(lambda: self.steps == before + steps)

    def open(self) -> None:
        self._permits.release(1_000_000)


def test_a_cancelled_song_is_gone_within_one_step(make_renderer: Make) -> None:
    renderer = make_renderer("tiny")
    gate = Gate(renderer)
    seen: list[Progress] = []
    ticket = renderer.submit(work_of(duration=60), on_progress=seen.append)
    while not seen:
        gate.let()
    renderer.cancel(ticket)
    gate.open()
    with pytest.raises(Cancelled):
        ticket.result(60)
    assert len(seen) <= 2
    assert all(p.stage == "rendering" for p in seen)  # nothing was decoded for it
    wait_until(lambda: renderer.stats()["songs"] == 0)
    assert renderer.submit(work_of()).result(60).items


def test_a_song_cancelled_while_decoding_stops_within_one_tile(make_renderer: Make) -> None:
    renderer = make_renderer("tiny", vae_tile_frames=60)
    gate = Gate(renderer)
    pieces: list[int] = []
    work = work_of(duration=60)
    work = RenderWork(work.request, on_audio=lambda item, first, samples, chunk: pieces.append(first))
    ticket = renderer.submit(work)
    while len(pieces) < 2:
        gate.let()
    renderer.cancel(ticket)
    gate.open()
    with pytest.raises(Cancelled):
        ticket.result(60)
    assert len(pieces) <= 3


def test_a_deadline_ends_a_song(make_renderer: Make) -> None:
    renderer = make_renderer("tiny")
    with pytest.raises(DeadlineExceeded):
        renderer.submit(work_of(duration=600), deadline=time.monotonic() + 0.1).result(60)


def test_a_more_urgent_song_overtakes_between_steps(make_renderer: Make) -> None:
    renderer = make_renderer("tiny")
    gate = Gate(renderer)
    order: list[str] = []
    slow = renderer.submit(work_of(duration=30), on_progress=lambda p: order.append("slow"))
    while not order:
        gate.let()
    waiting = renderer.submit(work_of(), on_progress=lambda p: order.append("waiting"))
    urgent = renderer.submit(work_of(), priority=-1.0, on_progress=lambda p: order.append("urgent"))
    gate.open()
    for ticket in (slow, waiting, urgent):
        ticket.result(60)
    first = {name: order.index(name) for name in ("slow", "urgent", "waiting")}
    assert first["slow"] < first["urgent"] < first["waiting"]
    assert max(i for i, name in enumerate(order) if name == "urgent") < max(
        i for i, name in enumerate(order) if name == "slow"
    )


def test_a_file_that_is_slow_to_read_holds_nobody_up(
    make_renderer: Make, song_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = make_renderer("tiny")
    read, go_on = sources.read_audio, threading.Event()

    def slow(path: Path, **options: Any) -> Any:
        assert go_on.wait(30)
        return read(path, **options)

    monkeypatch.setattr(sources, "read_audio", slow)
    source = song_file(4.0)
    cover = RenderWork(SongRequest(task="cover", src_audio="s", seed=1, steps=1), src_audio=source)
    slow_song = renderer.submit(cover)
    wait_until(lambda: renderer.stats()["preparing"] == 1)
    dropped = renderer.submit(cover, priority=-1.0)
    wait_until(lambda: renderer.stats()["preparing"] == 2)
    assert renderer.submit(work_of(), priority=-2.0).result(60).items
    renderer.cancel(dropped)
    with pytest.raises(Cancelled):
        dropped.result(5)
    assert not slow_song.future.done()
    go_on.set()
    assert slow_song.result(60).items


def test_a_song_joins_others_that_are_on_their_way(make_renderer: Make) -> None:
    renderer = make_renderer("tiny", max_batch_frames=1000)
    gate = Gate(renderer)
    started: list[Progress] = []
    first = renderer.submit(work_of(steps=16), on_progress=started.append)
    while not started:
        gate.let()
    second = renderer.submit(work_of(steps=4, seed=2))
    too_long = renderer.submit(work_of(duration=30, seed=3))
    gate.let(8)
    stats = renderer.stats()
    assert stats["denoise_rows"] > stats["denoise_steps"]
    assert stats["waiting"] == 1
    gate.open()
    for ticket in (first, second, too_long):
        ticket.result(60)


def test_a_poisoned_item_fails_alone(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    renderer = make_renderer("tiny", max_batch_frames=10_000)
    denoiser: Any = renderer._thread.engine._denoiser  # type: ignore[attr-defined]
    velocity = denoiser.velocity

    def poison(rows: list[Row]) -> list[Tensor]:
        for row in rows:
            if len(row.x) == 275:
                row.x[7] = float("nan")
        return velocity(rows)

    denoiser.velocity = poison
    good = renderer.submit(work_of(seed=4))
    bad = renderer.submit(work_of(duration=11, seed=5))
    also_good = renderer.submit(work_of(duration=12, seed=6))
    with pytest.raises(InvalidOutput, match="item 0: the DiT gave latents that are not finite") as failed:
        bad.result(60)
    assert failed.value.details == {"item": 0, "seed": 5}
    for ticket, fields in ((good, {"seed": 4}), (also_good, {"duration": 12, "seed": 6})):
        alone = renderers["tiny"].submit(work_of(**fields)).result(60)
        assert rel(ticket.result(60).items[0].audio, alone.items[0].audio) <= 1e-6


def test_latents_that_are_all_zero_are_no_song(make_renderer: Make) -> None:
    renderer = make_renderer("tiny")
    denoiser: Any = renderer._thread.engine._denoiser  # type: ignore[attr-defined]
    denoiser.velocity = lambda rows: [row.x / row.t for row in rows]
    with pytest.raises(InvalidOutput, match="all zero"):
        renderer.submit(work_of(timesteps=(1.0,), steps=None)).result(60)


def test_what_half_precision_cannot_do_is_done_again_in_float32(
    make_renderer: Make, renderers: dict[str, Renderer], rel: Any
) -> None:
    renderer = make_renderer("tiny", dtype="bfloat16")
    engine: Any = renderer._thread.engine
    velocity = engine._denoiser.velocity

    def overflow(rows: list[Row]) -> list[Tensor]:
        out = velocity(rows)
        return [v * float("inf") for v in out] if engine._denoiser.dtype == torch.bfloat16 else out

    engine._denoiser.velocity = overflow
    audio = renderer.submit(work_of()).result(60).items[0].audio
    assert renderer.stats()["float32_retries"] == 1
    assert audio.isfinite().all()
    assert rel(audio, renderers["tiny"].submit(work_of()).result(60).items[0].audio) < 0.1
    engine._denoiser.velocity = velocity
    renderer.submit(work_of(seed=2)).result(60)
    assert engine._denoiser.dtype == torch.bfloat16  # back, for songs that need no help


def test_float32_that_does_not_fit_fails_its_own_song_alone(
    make_renderer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = make_renderer("tiny", dtype="bfloat16")
    engine: Any = renderer._thread.engine
    velocity, to = engine._denoiser.velocity, torch.nn.Module.to

    def overflow(rows: list[Row]) -> list[Tensor]:
        return [v * (float("inf") if len(v) == 275 else 1.0) for v in velocity(rows)]

    def tight(module: torch.nn.Module, *args: Any) -> torch.nn.Module:
        if args == (torch.float32,):
            to(next(module.children()), torch.float32)  # runs out half-way
            raise torch.OutOfMemoryError("no room")
        return to(module, *args)

    engine._denoiser.velocity = overflow
    monkeypatch.setattr(torch.nn.Module, "to", tight)
    bad, good = renderer.submit(work_of(duration=11)), renderer.submit(work_of())
    with pytest.raises(OutOfMemory, match="the weights of the DiT"):
        bad.result(60)
    assert good.result(60).items
    assert {p.dtype for p in engine._denoiser.transformer.parameters()} == {torch.bfloat16}


def test_parts_that_do_not_fit_fail_one_song_and_go_back(make_renderer: Make) -> None:
    renderer = make_renderer("tiny", offload="stage", offload_dit=True)
    residency: Residency = renderer._thread.engine._residency  # type: ignore[attr-defined]
    for group in ("conditions", "dit", "vae"):
        residency.leave()
        module = residency._groups[group][-1]
        to, tried = module.to, []

        def tight(*args: Any, to: Any = to, tried: list[int] = tried) -> Any:
            tried.append(1)
            if len(tried) == 1:
                raise torch.OutOfMemoryError("no room")
            return to(*args)

        module.to = tight  # type: ignore[method-assign]
        with pytest.raises(OutOfMemory):
            renderer.submit(work_of()).result(60)
        assert residency._visiting is None
        assert renderer.submit(work_of()).result(60).items
        del module.to


def test_a_batch_that_does_not_fit_is_halved(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    renderer = make_renderer("tiny", max_batch_frames=10_000)
    denoiser: Any = renderer._thread.engine._denoiser  # type: ignore[attr-defined]
    forward = denoiser._forward

    def tight(latents: Tensor, *rest: Any) -> Tensor:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(latents, *rest)

    denoiser._forward = tight
    result = renderer.submit(work_of(batch_size=4)).result(60)
    assert renderer.stats()["batches_halved"] == 1  # and from then on the batches are smaller
    alone = renderers["tiny"].submit(work_of(batch_size=4)).result(60)
    for mine, other in zip(result.items, alone.items, strict=True):
        assert rel(mine.audio, other.audio) <= 1e-6


def test_a_song_that_never_fits_fails_with_numbers_and_spares_the_rest(make_renderer: Make) -> None:
    renderer = make_renderer("tiny")
    denoiser: Any = renderer._thread.engine._denoiser  # type: ignore[attr-defined]
    forward = denoiser._forward

    def tight(latents: Tensor, *rest: Any) -> Tensor:
        if latents.shape[1] > 300:
            raise torch.OutOfMemoryError("no room")
        return forward(latents, *rest)

    denoiser._forward = tight
    long, short = renderer.submit(work_of(duration=20)), renderer.submit(work_of())
    with pytest.raises(OutOfMemory, match=r"1 row\(s\) of 500 frames"):
        long.result(60)
    assert short.result(60).items


def test_a_song_that_cannot_fit_is_refused_before_it_starts(make_renderer: Make) -> None:
    renderer = make_renderer("tiny", memory_bytes=100_000_000, max_batch_frames=100_000)
    assert renderer.submit(work_of()).result(60).items
    before = renderer.stats()["denoise_steps"]
    with pytest.raises(OutOfMemory) as refused:
        renderer.submit(work_of(duration=600)).result(60)
    assert refused.value.details["needed_bytes"] > refused.value.details["free_bytes"] == 100_000_000
    assert renderer.stats()["denoise_steps"] == before


def test_pieces_join_to_the_whole(make_renderer: Make) -> None:
    renderer = make_renderer("tiny", vae_tile_frames=100)
    pieces: dict[int, list[tuple[int, Tensor]]] = {0: [], 1: []}
    work = work_of(duration=10.01, batch_size=2)
    work = RenderWork(work.request, on_audio=lambda item, first, samples, chunk: pieces[item].append((first, chunk)))
    for item in renderer.submit(work).result(60).items:
        at = 0
        for first, chunk in pieces[item.index]:
            assert first == at
            at += chunk.shape[1]
        assert len(pieces[item.index]) > 2
        assert torch.equal(torch.cat([chunk for _, chunk in pieces[item.index]], dim=1), item.audio)
        assert item.audio.shape == (2, 480_480)


def test_a_failing_listener_harms_nobody(renderers: dict[str, Renderer]) -> None:
    def broken(*args: Any) -> None:
        raise ValueError("listener")

    work = RenderWork(work_of().request, on_audio=broken)
    assert renderers["tiny"].submit(work, on_progress=broken).result(60).items


def test_progress_counts_steps_and_frames(renderers: dict[str, Renderer]) -> None:
    seen: list[Progress] = []
    renderers["tiny-base"].submit(work_of(batch_size=2, sampler="heun"), on_progress=seen.append).result(60)
    for item in (0, 1):
        steps = [(p.done, p.total) for p in seen if p.item == item and p.stage == "rendering"]
        assert steps == [(1, 3), (2, 3), (3, 3)]
        assert [p for p in seen if p.item == item][-1].done == 250


def test_many_threads_share_one_renderer(renderers: dict[str, Renderer]) -> None:
    # Four threads on one AceStepPipeline: most calls raise, because the scheduler is shared.
    expected = {seed: renderers["tiny"].submit(work_of(seed=seed)).result(60).items[0].audio for seed in range(4)}
    failures: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            for _ in range(2):
                got = renderers["tiny"].submit(work_of(seed=seed)).result(60).items[0].audio
                assert torch.equal(got, expected[seed])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("offload_dit", [False, True])
def test_offload_equals_resident(
    make_renderer: Make, renderers: dict[str, Renderer], song_file: Callable[..., Path], offload_dit: bool
) -> None:
    offloaded = make_renderer("tiny", offload="stage", offload_dit=offload_dit)
    source = song_file(4.0)
    requests = [
        work_of(),
        work_of(duration=None, audio_codes=(1, 2, 3, 4000) * 13),
        RenderWork(SongRequest(task="cover", src_audio=str(source), seed=1, steps=2), src_audio=source),
    ]
    for work in requests:
        got = offloaded.submit(work).result(60)
        assert torch.equal(got.items[0].audio, renderers["tiny"].submit(work).result(60).items[0].audio)
    assert offloaded.stats()["offload_moves"] >= len(requests) * (3 if offload_dit else 2)


def test_offloaded_parts_are_there_whenever_they_are_used(make_renderer: Make, song_file: Callable[..., Path]) -> None:
    # diffusers moves a part when its forward is called; reading codes calls none, so on a card it would fail.
    renderer = make_renderer("tiny", offload="stage", offload_dit=True)
    engine: Any = renderer._thread.engine
    residency: Residency = engine._residency
    used: set[str] = set()

    def watch(group: str) -> Callable[..., None]:
        def check(*args: Any) -> None:
            used.add(group)
            assert residency._visiting == group

        return check

    for group, modules in residency._groups.items():
        for module in modules:
            for part in module.modules():
                part.register_forward_pre_hook(watch(group))
    quantizer: Any = engine._preparation._conditions._parts.audio_tokenizer.quantizer
    decode, check = quantizer.get_output_from_indices, watch("conditions")
    quantizer.get_output_from_indices = lambda indices: (check(), decode(indices))[1]
    source = song_file(4.0)
    for work in (
        work_of(duration=None, audio_codes=(7,) * 50, batch_size=2),
        RenderWork(
            SongRequest(task="cover", src_audio="s", seed=1, steps=2, audio_cover_strength=0.5), src_audio=source
        ),
    ):
        assert renderer.submit(work).result(60).items
    assert len(renderer.submit_codes(source).result()) == 20
    assert used == {"conditions", "dit", "vae"}


def test_one_offloaded_group_is_on_the_device_at_a_time() -> None:
    # "meta" stands in for the card: what is there can be told from what is not.
    device = torch.device("meta")
    groups = {name: (torch.nn.Linear(2, 2),) for name in ("a", "b", "stays")}
    residency = Residency(groups, device, frozenset({"a"}))
    assert {name: module.weight.device.type for name, (module,) in groups.items()} == {
        "a": "cpu", "b": "meta", "stays": "meta",
    }  # fmt: skip
    residency.need("b")
    assert residency.moves == 0
    residency.need("a")
    residency.need("a")
    assert residency.moves == 1
    assert groups["a"][0].weight.device.type == "meta"


def test_int8_stays_close(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    audio = make_renderer("tiny", int8=True).submit(work_of()).result(60).items[0].audio
    exact = renderers["tiny"].submit(work_of()).result(60).items[0].audio
    assert 0 < rel(audio, exact) < 0.05


def test_eager_attention_everywhere(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    eager = make_renderer("tiny", attention="eager")
    assert eager.info.attention == "eager"
    for fields in ({}, {"duration": None, "audio_codes": tuple(range(55))}):
        audio = eager.submit(work_of(**fields)).result(60).items[0].audio
        assert rel(audio, renderers["tiny"].submit(work_of(**fields)).result(60).items[0].audio) <= 1e-5


def test_bfloat16_stays_close(make_renderer: Make, renderers: dict[str, Renderer], rel: Any) -> None:
    audio = make_renderer("tiny", dtype="bfloat16").submit(work_of()).result(60).items[0].audio
    assert rel(audio, renderers["tiny"].submit(work_of()).result(60).items[0].audio) < 0.1


class TestLora:
    @staticmethod
    def write(folder: Path, renderer: Renderer) -> Path:
        transformer: Any = renderer._thread.engine._denoiser.transformer  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name in ("layers.0.self_attn.to_q", "layers.1.cross_attn.to_k", "layers.1.cross_attn.to_v"):
            module = transformer.get_submodule(name)
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def test_changes_its_own_request_and_no_other(self, make_renderer: Make, tmp_path: Path, rel: Any) -> None:
        renderer = make_renderer("tiny-base", max_batch_frames=10_000)
        adapter = Lora(path=str(self.write(tmp_path / "style", renderer)), scale=0.7)
        plain = renderer.submit(work_of()).result(60).items[0].audio
        changed = renderer.submit(work_of(lora=adapter)).result(60)
        assert rel(changed.items[0].audio, plain) > 1e-3
        assert changed.settings["lora"][0]["name"] == "style"
        assert torch.equal(renderer.submit(work_of()).result(60).items[0].audio, plain)
        tickets: list[Ticket[RenderWork, Rendered]] = [
            renderer.submit(work_of(lora=x)) for x in (adapter, None, adapter)
        ]
        with_it, without, again = (ticket.result(60).items[0].audio for ticket in tickets)
        assert rel(with_it, changed.items[0].audio) <= 1e-6
        assert rel(again, changed.items[0].audio) <= 1e-6
        assert rel(without, plain) <= 1e-6

    def test_what_is_left_out_is_said(self, make_renderer: Make, tmp_path: Path) -> None:
        renderer = make_renderer("tiny")
        file = self.write(tmp_path / "style", renderer) / "adapter_model.safetensors"
        text = {f"lora_te_fc1.lora_{side}.weight": torch.ones(4, 4) for side in ("down", "up")}
        save_file({**load_file(file), **text}, file)
        (said,) = (
            a
            for a in renderer.submit(work_of(lora=Lora(path=str(file.parent)))).result(60).adjustments
            if "lora" in a.field
        )
        assert (said.field, said.asked, said.given) == ("lora.path", "style", "3 of 4 layers")
        assert "te_fc1" in said.reason

    def test_an_absent_adapter_is_refused(self, renderers: dict[str, Renderer], tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="lora"):
            renderers["tiny"].submit(work_of(lora=Lora(path=str(tmp_path)))).result(60)


def test_a_closed_renderer_takes_nothing(make_renderer: Make) -> None:
    renderer = make_renderer("tiny")
    running = renderer.submit(work_of(duration=600))
    renderer.close()
    with pytest.raises(Cancelled):
        running.result(5)
    with pytest.raises(Unavailable):
        renderer.submit(work_of())
    assert not renderer.alive


def test_items_must_be_of_the_batch(renderers: dict[str, Renderer]) -> None:
    with pytest.raises(InvalidRequest, match=r"^items: "):
        renderers["tiny"].submit(RenderWork(work_of().request, items=(1,)))


def test_a_missing_seed_is_drawn_and_told(renderers: dict[str, Renderer]) -> None:
    first = renderers["tiny"].submit(work_of(seed=None)).result(60).items[0]
    again = renderers["tiny"].submit(work_of(seed=first.seed)).result(60).items[0]
    assert torch.equal(first.audio, again.audio)
