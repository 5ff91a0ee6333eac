"""The engine between callers: cancelling, deadlines, order, poison, memory, streaming, offload and int8."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from renderer_requests import Make, work_of
from torch import Tensor

from acestep.dit import sources
from acestep.dit.denoiser import Row
from acestep.dit.renderer import Renderer
from acestep.dit.residency import Residency
from acestep.dit.work import RenderWork
from acestep.errors import Cancelled, DeadlineExceeded, InvalidOutput, InvalidRequest, OutOfMemory, Unavailable
from acestep.request import SongRequest
from acestep.song import Progress


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
