"""The renderer's engine: many songs in flight, one piece of work per step.

A piece is a denoising step of a batch, a VAE tile, or one part of a song's preparation. Songs go by (priority, arrival); others join
the first one's denoising steps where the frames of all of them fit the budget. An item's numbers do not depend on who shares its steps.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from acestep.checkpoints.published import VariantDefaults
from acestep.dit import checks
from acestep.dit.denoiser import Denoiser, Row
from acestep.dit.preparation import Preparation, Prepared, song_samples, work_codes
from acestep.dit.residency import Residency
from acestep.dit.runs import ItemRun, SongRun
from acestep.dit.sampler import finished
from acestep.dit.sources import Steps
from acestep.dit.vae import Vae
from acestep.dit.work import CodesWork, Rendered, RenderWork
from acestep.errors import AceStepError, Internal, InvalidOutput, OutOfMemory
from acestep.request import Adjustment
from acestep.song import SAMPLES_PER_FRAME, Progress, RenderTimings
from acestep.worker import Ticket

log = logging.getLogger(__name__)

Work = RenderWork | CodesWork
Result = Rendered | tuple[int, ...]

_MAX_SONGS = 16
_READ_WAIT_S = 0.02  # how long a cancellation may go unseen while all songs wait for their files
_MAX_PREEMPTING = 4  # songs that may overtake a running one


class RenderEngine:
    """Implements `acestep.worker.Engine` for `RenderWork` and `CodesWork`.

    Args:
        budget: Rows times padded frames that may share a denoising step. A single item always may.
    """

    def __init__(
        self,
        preparation: Preparation,
        denoiser: Denoiser,
        vae: Vae,
        residency: Residency,
        defaults: VariantDefaults,
        name: str,
        device: torch.device,
        budget: int,
        retry_in_float32: bool,
    ) -> None:
        self._preparation = preparation
        self._denoiser = denoiser
        self._vae = vae
        self._residency = residency
        self._defaults = defaults
        self._name = name
        self._device = device
        self._budget = budget
        self._dtype = denoiser.dtype
        self._retry_in_float32 = retry_in_float32 and denoiser.dtype != torch.float32
        self._songs: list[SongRun] = []
        self._order = itertools.count()
        self._denoise_steps = 0
        self._rows = 0
        self._halved = 0
        self._retried = 0

    # -- acestep.worker.Engine

    def has_room(self, ticket: Ticket[Work, Result]) -> bool:
        ahead = [song for song in self._songs if song.denoising]
        if not ahead:
            return len(self._songs) < _MAX_SONGS
        if ticket.priority < min(song.rank[0] for song in ahead):
            return len(ahead) < _MAX_PREEMPTING
        return (
            len(self._songs) < _MAX_SONGS
            and sum(song.frames for song in ahead) + self._frames_of(ticket.work) <= self._budget
        )

    def add(self, ticket: Ticket[Work, Result]) -> None:
        work = ticket.work
        if isinstance(work, CodesWork):
            preparation: Steps[Any] = self._codes(work)
        else:
            checks.check(work.request, self._defaults, self._name)
            preparation = self._preparation.prepare(work)
        self._songs.append(SongRun(ticket, next(self._order), preparation, self._frames_of(work)))
        self._songs.sort(key=lambda song: song.rank)

    def remove(self, ticket: Ticket[Work, Result]) -> None:
        self._songs = [song for song in self._songs if song.ticket is not ticket]
        self._denoiser.forget()

    def reset(self) -> None:
        self._songs.clear()
        self._denoiser.forget()
        self._residency.leave()

    def stats(self) -> dict[str, Any]:
        songs = list(self._songs)
        runs = [run for song in songs for run in list(song.runs)]
        return {
            "songs": len(songs),
            "preparing": sum(song.preparation is not None for song in songs),
            "denoising": sum(run.pending is not None for run in runs),
            "decoding": sum(run.tiles is not None and not run.decoded for run in runs),
            "batch_frames": self._budget,
            "denoise_steps": self._denoise_steps,
            "denoise_rows": self._rows,
            "vae_tiles": self._vae.tiles,
            "batches_halved": self._halved,
            "float32_retries": self._retried,
            "offload_moves": self._residency.moves,
            "attention": self._denoiser.attention.backend,
        }

    def step(self) -> bool:
        for song in self._songs:
            if song.preparation is not None and not song.waiting:
                self._prepare(song)
                return True
        for song in self._songs:
            for run in song.runs:
                if run.tiles is not None and not run.decoded:
                    self._decode(song, run)
                    return True
            if song.runs:
                self._denoise()
                return True
        if reading := [song.reading for song in self._songs if song.reading is not None]:
            concurrent.futures.wait(reading, timeout=_READ_WAIT_S, return_when=concurrent.futures.FIRST_COMPLETED)
        return bool(self._songs)

    # -- preparation

    def _prepare(self, song: SongRun) -> None:
        assert song.preparation is not None
        begin = time.monotonic()
        try:
            song.reading = None
            song.reading = next(song.preparation)
        except StopIteration as done:
            song.preparation = None
            if isinstance(done.value, Prepared):
                song.prepared = done.value
                song.runs = [ItemRun(item, self._device, self._dtype) for item in done.value.items]
                song.frames = sum(run.frames * len(run.pending or ()) for run in song.runs)
            else:
                self._close(song, result=done.value)
        except torch.OutOfMemoryError as error:
            self._close(song, error=self._out_of_memory("the conditions of a song", error))
        except AceStepError as error:
            self._close(song, error=error)
        except Exception:
            log.exception("preparation of %s failed", song.ticket.id)
            self._close(song, error=Internal(f"the song could not be prepared; quote id {song.ticket.id}"))
        song.seconds["conditions_s"] += time.monotonic() - begin

    def _codes(self, work: CodesWork) -> Steps[tuple[int, ...]]:
        latents = yield from self._preparation.sources.latents(work.path, "audio")
        return self._preparation.codes_of(latents)

    # -- denoising

    def _denoise(self) -> None:
        begin = time.monotonic()
        batch = self._batch()
        song, first = batch[0]
        try:
            self._residency.need("dit")
            self._denoiser.set_precision(first.precision or self._dtype)
            for _, run in batch:
                if run.stale:
                    run.renew(self._denoiser)
        except torch.OutOfMemoryError as error:
            self._close(song, error=self._out_of_memory("the weights of the DiT", error))
            return
        rows = [row for _, run in batch for row in run.pending or ()]
        outcomes = iter(self._evaluate(rows))
        self._denoise_steps += 1
        self._rows += len(rows)
        for song, run in batch:
            mine = [next(outcomes) for _ in run.pending or ()]
            before, listening = run.walker.done, run.listening
            if failure := next((o for o in mine if isinstance(o, AceStepError)), None):
                if listening:
                    self._not_heard(song, run, failure)
                else:
                    self._close(song, error=failure)
                continue
            run.send([o for o in mine if isinstance(o, Tensor)])
            if run.walker.done > before:
                self._report(song, run, "rendering", run.walker.done, run.walker.total)
            if listening and run.pending is None:
                self._check_maps(song, run)
            elif run.latents is not None and not listening:
                self._check_latents(song, run)
        seconds = time.monotonic() - begin
        for song in {id(song): song for song, _ in batch}.values():
            song.seconds["denoise_s"] += seconds

    def _batch(self) -> list[tuple[SongRun, ItemRun]]:
        """The first item in order, and after it those that fit the budget together with it."""
        waiting = [(song, run) for song in self._songs for run in song.runs if run.pending is not None]
        first, run = waiting[0]
        batch, rows, longest, room = [waiting[0]], len(run.pending or ()), run.frames, min(self._budget, first.room)
        alike = (run.precision, run.listening)  # who listens only must not change who shares a step
        for song, run in waiting[1:]:
            more, longer, tighter = rows + len(run.pending or ()), max(longest, run.frames), min(room, song.room)
            if (run.precision, run.listening) == alike and more * longer <= tighter:
                batch.append((song, run))
                rows, longest, room = more, longer, tighter
        return batch

    def _evaluate(self, rows: Sequence[Row]) -> list[Tensor | AceStepError]:
        """Velocities of `rows`. Where memory runs out, of two halves, and where one of them does not fit, its rows fail."""
        try:
            return list(self._denoiser.velocity(rows))
        except torch.OutOfMemoryError as error:
            log.warning("a batch of %d rows did not fit: %s", len(rows), error)
        self._free()
        self._halved += 1
        if len(rows) > 1:
            self._budget = min(self._budget, len(rows) // 2 * max(len(row.x) for row in rows))
        middle = max(1, len(rows) // 2)
        outcomes: list[Tensor | AceStepError] = []
        for half in (rows[:middle], rows[middle:]):
            if not half:
                continue
            try:
                outcomes += self._denoiser.velocity(half)
            except torch.OutOfMemoryError as error:
                failure = self._out_of_memory(f"{len(half)} row(s) of {max(len(r.x) for r in half)} frames", error)
                outcomes += [failure] * len(half)
        return outcomes

    def _check_latents(self, song: SongRun, run: ItemRun) -> None:
        latents = run.latents
        assert latents is not None
        if bool(torch.isfinite(latents).all() & latents.any()):
            run.latents = finished(run.item.path, latents)
            if run.item.lyrics is not None:
                run.listen()
            else:
                run.begin_decoding(self._vae)
            return
        if self._retry_in_float32 and run.precision is None:
            log.warning("item %d of %s is not finite; denoising it again in float32", run.item.index, song.ticket.id)
            self._retried += 1
            run.precision, run.stale = torch.float32, True
            run.start()
            return
        self._close(song, error=self._invalid(run, "the DiT gave latents that are not finite, or all zero"))

    def _check_maps(self, song: SongRun, run: ItemRun) -> None:
        if not all(bool(torch.isfinite(seen).all()) for seen in run.maps or ()):
            self._not_heard(song, run, self._invalid(run, "the DiT gave attention that is not finite"))
        elif run.item.latents is None:
            run.begin_decoding(self._vae)
        else:
            self._end(song, run)

    def _not_heard(self, song: SongRun, run: ItemRun, error: AceStepError) -> None:
        """A song goes on without what was to be heard in it, where more is asked for than that."""
        request = song.ticket.work.request
        if run.item.latents is not None or request.strict:
            self._close(song, error=error)
            return
        field = "timestamps" if request.timestamps else "score"
        song.told.append(Adjustment(field=field, asked=True, given=False, reason=error.message))
        run.maps = None
        run.begin_decoding(self._vae)

    # -- decoding

    def _decode(self, song: SongRun, run: ItemRun) -> None:
        begin = time.monotonic()
        assert run.tiles is not None
        try:
            self._residency.need("vae")
            frame, piece = next(run.tiles)
        except AceStepError as error:
            self._close(song, error=error)
            return
        except torch.OutOfMemoryError as error:
            self._close(song, error=self._out_of_memory("the weights of the VAE", error))
            return
        if not bool(torch.isfinite(piece).all()):
            self._close(song, error=self._invalid(run, "the VAE gave samples that are not finite"))
            return
        first = frame * SAMPLES_PER_FRAME
        self._hand_out(song, run, first, run.keep(first, piece))
        done = frame + -(-piece.shape[1] // SAMPLES_PER_FRAME)
        self._report(song, run, "decoding", done, run.frames)
        song.seconds["decode_s"] += time.monotonic() - begin
        if done >= run.frames:
            self._end(song, run)

    def _end(self, song: SongRun, run: ItemRun) -> None:
        item, on_item = run.finish(), song.ticket.work.on_item
        if on_item is not None:
            self._tell(song, lambda: on_item(item, self._settings(song)))
        if all(other.decoded for other in song.runs):
            self._close(song, result=self._rendered(song))

    def _hand_out(self, song: SongRun, run: ItemRun, first: int, part: Tensor) -> None:
        on_audio = song.ticket.work.on_audio
        if on_audio is not None:
            self._tell(song, lambda: on_audio(run.item.index, first, run.item.samples, run.heard(first, part)))

    @staticmethod
    def _tell(song: SongRun, listener: Callable[[], None]) -> None:
        if song.ticket.cancelled:
            return
        try:
            listener()
        except Exception:  # a listener's defect must not stop other callers' work
            log.exception("a listener of %s failed", song.ticket.id)

    def _rendered(self, song: SongRun) -> Rendered:
        assert song.prepared is not None
        return Rendered(
            items=tuple(run.rendered for run in song.runs if run.rendered is not None),
            timings=RenderTimings(queued_s=song.ticket.queued_s, **song.seconds),
            settings=self._settings(song),
            adjustments=(*song.prepared.adjustments, *song.told),
        )

    @staticmethod
    def _settings(song: SongRun) -> dict[str, Any]:
        assert song.prepared is not None
        request = song.ticket.work.request
        return {
            "task": request.task,
            **song.prepared.sampling.as_settings(),
            "retake_variance": request.retake_variance if request.retakes else 0.0,
            "retaken": [] if request.flow_edit_morph else [other.model_dump() for other in request.retaken],
            "lora": song.prepared.lora.as_settings() if song.prepared.lora else None,
        }

    # -- shared

    def _frames_of(self, work: Work) -> int:
        """Rows times frames that a work asks for; more than any budget where only its source audio will tell."""
        if isinstance(work, CodesWork) or work.src_audio is not None:
            return self._budget + 1
        samples = [song_samples(work, work_codes(work, index), None) for index in work.indices]
        guidance = work.request.guidance_scale or self._defaults.guidance_scale
        rows = 2 if min(guidance, self._defaults.guidance_scale) > 1.0 else 1
        return sum(rows * -(-s // SAMPLES_PER_FRAME) for s in samples)

    def _close(self, song: SongRun, *, result: Any = None, error: AceStepError | None = None) -> None:
        self._songs = [other for other in self._songs if other is not song]
        self._denoiser.forget()
        if error is not None:
            song.ticket.fail(error)
        else:
            song.ticket.finish(result)

    @staticmethod
    def _report(song: SongRun, run: ItemRun, stage: Any, done: int, total: int) -> None:
        song.ticket.progress(Progress(stage=stage, done=done, total=total, item=run.item.index))

    @staticmethod
    def _invalid(run: ItemRun, what: str) -> InvalidOutput:
        return InvalidOutput(
            f"item {run.item.index}: {what}. Try another seed; if it stays, the checkpoint or the precision is at fault.",
            item=run.item.index, seed=run.item.seed,
        )  # fmt: skip

    def _free(self) -> None:
        self._denoiser.forget()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _out_of_memory(self, what: str, error: BaseException) -> OutOfMemory:
        self._free()
        details = {}
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            details = {
                "free_bytes": free,
                "total_bytes": total,
                "held_bytes": torch.cuda.memory_allocated(self._device),
            }
        log.warning("out of memory for %s: %s (%s)", what, error, details)
        free_mib = f", {details['free_bytes'] >> 20} MiB are free" if details else ""
        return OutOfMemory(
            f"{what} do not fit in the memory of {self._device}{free_mib}. Ask for a shorter song or use a larger card.",
            **details,
        )
