"""The one door into the system, for every API: what a request becomes, what it takes, and the job that is written down for it.

A quote goes the same way and stops before the job is written.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from acestep.adjust import check_sources, over_plan
from acestep.audio.latent_file import LatentFacts
from acestep.dit import checks
from acestep.dit.window import window_of
from acestep.errors import InvalidRequest, LimitExceeded
from acestep.request import Adjustment, SongRequest
from acestep.sizing.cost import expected_duration
from acestep.sizing.limits import unscored
from acestep.song import SAMPLE_RATE
from acestep.source_fields import Parent
from acestep.tasks import RULES
from deployments.dispatch.texts import question_of
from deployments.ingress.auth import Caller
from deployments.ingress.forecast import STAGED
from deployments.ingress.service import Service, defaults_of, hash_of
from deployments.ingress.source_audio import Admitted
from deployments.jobs.limits import Caps
from deployments.jobs.store import Busy, Job
from deployments.scheduling.choose import Decision
from deployments.scheduling.line import Place
from deployments.telemetry.tracing import TRACE, here


@dataclass(frozen=True)
class Proposal:
    """A request as it would be made.

    Attributes:
        request: After what its sources, its plan and the fleet's limits change.
        adjustments: What that was.
        place: Where it would stand in the line; None where that is not known.
        decision: Where it would go, and when; None where it has no stages of a song, and where the fleet is not known yet.
        columns: Of the job: its pools and estimates.
        audio_s: Seconds of audio, over all items.
        caps: The limits that hold for it.
    """

    request: SongRequest
    adjustments: tuple[Adjustment, ...]
    place: Place | None
    decision: Decision | None
    columns: dict[str, Any] = field(default_factory=dict)
    audio_s: float = 0.0
    caps: Caps = field(default_factory=Caps)

    @property
    def work_s(self) -> float:
        return float(self.columns.get("est_plan_s", 0.0) + self.columns.get("est_render_s", 0.0))


async def submit(
    service: Service,
    request: SongRequest,
    caller: Caller,
    *,
    kind: str = "song",
    adjustments: tuple[Adjustment, ...] = (),
    extra: dict[str, Any] | None = None,
    deadline: float | None = None,
    idempotency_key: str | None = None,
    body_hash: str | None = None,
    parents: tuple[Parent, ...] = (),
) -> tuple[Job, bool]:
    """Take source audio in, clamp to what the fleet can do, draw the seeds, write the job down, wake the dispatcher.

    Returns (job, created): False where the idempotency key was known already.

    Args:
        kind: `song`, `plan`, `codes` or `understand`: how far the job goes; `lyrics` listens to the request's latents.
        adjustments: What was changed before.
        extra: For the API that asks.
        parents: Songs that it is made from, besides those that are its sources.
        deadline: Unix seconds by which it must be done.

    Raises:
        InvalidRequest, LimitExceeded: nothing in this fleet can do it, or not by its deadline.
        Busy: a limit of the server or of the caller; nothing was written.
    """
    body_hash = body_hash or hash_of(request.model_dump(mode="json", exclude_defaults=True), kind, extra)
    if idempotency_key is not None:
        known = await asyncio.to_thread(service.store.earlier, caller.name, idempotency_key, body_hash)
        if known is not None:
            return known, False
    proposal = await _propose(service, request, caller, kind, adjustments, extra, parents=parents, deadline=deadline)
    extra = dict(extra or {})
    if proposal.decision is not None and proposal.decision.eta_s is not None:
        extra["eta_s"] = round(proposal.decision.eta_s, 3)
    if trace := here():
        extra[TRACE] = trace
    try:
        job, created = await asyncio.to_thread(
            service.store.add, str(uuid.uuid4()), proposal.request.with_seeds(), kind=kind, adjustments=proposal.adjustments,
            extra=extra, deadline=deadline, owner_key=caller.name, idempotency_key=idempotency_key,
            body_hash=body_hash, audio_s=proposal.audio_s, caps=proposal.caps, **proposal.columns,
        )  # fmt: skip
    except Busy as error:
        raise await _with_retry(service, error) from None
    if created:
        service.dispatcher.changed()
    return job, created


async def quote(service: Service, request: SongRequest, caller: Caller, *, deadline: float | None = None) -> Proposal:
    """What `submit` would make of a request, and when. Nothing is written and no limit is used up.

    Raises: as `submit` does.
    """
    proposal = await _propose(service, request, caller, "song", deadline=deadline, keep=False)
    try:
        await asyncio.to_thread(service.store.check, proposal.caps, caller.name, proposal.audio_s, proposal.work_s)
    except Busy as error:
        raise await _with_retry(service, error) from None
    return proposal


async def _with_retry(service: Service, error: Busy) -> Busy:
    if "retry_after" not in error.details:
        error.details["retry_after"] = await service.mean_seconds()
    return error


async def _propose(
    service: Service,
    request: SongRequest,
    caller: Caller,
    kind: str,
    adjustments: tuple[Adjustment, ...] = (),
    extra: dict[str, Any] | None = None,
    *,
    parents: tuple[Parent, ...] = (),
    deadline: float | None = None,
    keep: bool = True,
) -> Proposal:
    """What a request becomes and takes.

    Args:
        keep: Take its source audio into the file store; else it is only measured.
    """
    told: list[Adjustment] = []
    latents: list[tuple[str, LatentFacts]] = []
    if kind != "lyrics":  # its sources came with the song that it listens to
        request, told, latents = await _with_sources(service, request, caller, keep, parents)
    request, changed = over_plan(request)
    adjustments = (*told, *adjustments, *changed)
    if kind == "song":
        if request.source_s is not None and RULES[request.task].window:
            window_of(request, round(request.source_s * SAMPLE_RATE))
        adjustments = (*adjustments, *checks.notes(request))
    if kind in STAGED:
        adjustments = (*adjustments, *unscored(request))
    columns: dict[str, Any] = {}
    place, decision = await _admit(service, request, caller, kind, deadline)
    if decision is not None:
        request = decision.request
        if kind in ("song", "lyrics") and (pool := service.fleet.view.get(decision.renderer or "")) and pool.info:
            checks.check(request, defaults_of(pool.info), str(pool.info["model"]))
            _check_latents(latents, pool.info)
        adjustments = (*adjustments, *decision.adjustments)
        columns = decision.columns
        if decision.eta_s is not None:
            _check_wait(service, decision.wait_s)
            if deadline is not None:
                _check_deadline(deadline - time.time(), decision.eta_s)
    if (asked := question_of(kind, request, extra)) and not (decision and decision.planner):
        columns |= service.routing.question(service.fleet.view, asked)
    replicas = sum(p.running for p in service.fleet.view.of("render"))
    return Proposal(
        request=request,
        adjustments=adjustments,
        place=place,
        decision=decision,
        columns=columns,
        audio_s=expected_duration(request)[0] * request.batch_size if kind == "song" else 0.0,
        caps=replace(caller.caps, queued=service.args.max_queue, pace=max(1.0, float(replicas))),
    )


async def _admit(
    service: Service, request: SongRequest, caller: Caller, kind: str, deadline: float | None
) -> tuple[Place | None, Decision | None]:
    """Where a new song or plan would go, and when: behind what the fair order serves before this caller, not behind everybody."""
    if kind not in STAGED:
        return None, None
    only_plan = kind == "plan"
    me = service.routing.newcomer(service.fleet.view, request, caller.name, only_plan=only_plan, deadline=deadline)
    place, working = await service.forecast.newcomer(me)
    return place, service.routing.admit(service.fleet.view, request, me, place, working, only_plan=only_plan)


def _check_wait(service: Service, wait_s: float) -> None:
    most = service.args.max_backlog_s
    if wait_s > most:
        raise Busy(
            f"this would wait about {wait_s:.0f} s; the server takes nothing that waits longer than {most:.0f} s",
            retry_after=wait_s - most,
            limit=most,
        )


def _check_latents(latents: list[tuple[str, LatentFacts]], info: Mapping[str, Any]) -> None:
    """Refuse latents that the renderer of a pool cannot decode, as far as it has told what it can."""
    for name, facts in latents:
        if channels := info.get("latent_channels"):
            facts.check_fits(name, channels=channels, vae=str(info.get("vae") or facts.vae), model=str(info["model"]))


def _check_deadline(left_s: float, eta_s: float) -> None:
    if eta_s > left_s:
        raise LimitExceeded(
            f"deadline_s: this would be there in about {eta_s:.1f} s at the earliest; ask for no less, or for less music",
            field="deadline_s", asked=round(left_s, 1), limit=round(eta_s, 1),
        )  # fmt: skip


async def _with_sources(
    service: Service, request: SongRequest, caller: Caller, keep: bool, parents: tuple[Parent, ...]
) -> tuple[SongRequest, list[Adjustment], list[tuple[str, LatentFacts]]]:
    """The request with every source audio it names taken into the file store (`keep`), and measured; what there is to say about it; and
    what its latents say of themselves, by field.

    Raises:
        InvalidRequest: it is not there, no audio, or too short or long.
    """
    for name in ("source_s", "source_latents", "parents"):
        if getattr(request, name) not in (None, False, ()):
            raise InvalidRequest(f"{name}: is found out, not asked", field=name)
    if request.latents:
        raise InvalidRequest(
            "latents: are not asked for; POST /v1/jobs/{id}/lyrics finds a song's own", field="latents"
        )
    changes: dict[str, Any] = {}
    taken: list[tuple[str, Admitted]] = []
    if request.src_audio is not None:
        source = await service.source(request.src_audio, caller, "src_audio", keep=keep)
        taken.append(("src_audio", source))
        changes |= {"source_s": source.seconds, "source_latents": source.facts is not None}
        changes |= {"src_audio": source.path} if keep else {}
    if request.reference_audio:
        files = [await service.source(name, caller, "reference_audio", keep=keep) for name in request.reference_audio]
        taken += [("reference_audio", file) for file in files]
        changes |= {"reference_audio": tuple(file.path for file in files)} if keep else {}
    named = [Parent(field=name, **file.song.model_dump()) for name, file in taken if file.song]
    changes |= {"parents": (*parents, *named)}
    references_s = [file.seconds for name, file in taken if name == "reference_audio"]
    told = check_sources(changes.get("source_s"), references_s, strict=request.strict)
    latents = [(name, file.facts) for name, file in taken if file.facts]
    return request.model_copy(update=changes), told, latents
