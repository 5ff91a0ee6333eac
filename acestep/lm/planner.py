"""`Planner`: a checkpoint on a device, ready for work."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acestep.errors import DeviceUnavailable, OutOfMemory
from acestep.hardware.devices import make_current
from acestep.lm.adapters import PlannerAdapters
from acestep.lm.attention import decode_kernel
from acestep.lm.decoder import Decoder
from acestep.lm.engine import PlannerEngine
from acestep.lm.flows import FlowBuilder
from acestep.lm.grammar import Grammar
from acestep.lm.loading import check_vocabulary, load_model, read_model_config
from acestep.lm.memory import arena_tokens
from acestep.lm.prompts import PromptBuilder
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.lm.work import PlannerWork, Sample
from acestep.plan import Plan
from acestep.song import TINY_NOTICE, Progress
from acestep.stage_settings import PlannerSettings
from acestep.worker import EngineThread, Ticket

log = logging.getLogger(__name__)

_SMALL_BYTES = 32 << 20  # weights below this gain nothing from a second thread, and lose much where the cores are busy


@dataclass(frozen=True)
class PlannerInfo:
    """What is loaded, for health and manifests.

    `invariant_rows` is None where codes may depend on the batch; `graphs` counts the CUDA graphs recorded.
    """

    name: str
    hash: str | None
    notice: str | None
    device: str
    dtype: str
    slots: int
    max_len: int
    weight_bytes: int
    invariant_rows: int | None
    graphs: int
    load_s: float


class Planner:
    """Plans many songs at once on one device. Thread-safe; the work runs on a thread of its own.

    The same request with the same seeds gives the same plan, alone or in any company. In float32 on a CPU that holds bit for bit
    for one machine and thread count, where `info.invariant_rows` says that its matrix products allow it. Elsewhere, and between
    machines, the noise is still the same, but a last bit of a logit may tip a draw.
    """

    def __init__(self, engine: PlannerEngine, info: PlannerInfo) -> None:
        self.info = info
        self._thread: EngineThread[PlannerWork, Plan | Sample] = EngineThread(
            engine, name="planner", begin=partial(make_current, info.device)
        )

    @classmethod
    def load(
        cls, path: Path, settings: PlannerSettings, *, name: str | None = None, model_hash: str | None = None
    ) -> Planner:
        """Read a checkpoint folder in the published layout.

        Args:
            name, model_hash: Written into every plan; the folder's name where not given.

        Raises:
            ModelMissing: The folder holds no usable planner; the message says what is wrong with it.
            DeviceUnavailable: The device is not there.
            OutOfMemory: Weights and the keys and values of one song do not fit.
        """
        begin = time.monotonic()
        path = Path(path)
        config, raw = read_model_config(path)
        tokenizer = PlannerTokenizer.load(path)
        check_vocabulary(tokenizer, config, path)
        device, dtype = _device(settings.device), getattr(torch, settings.dtype)
        max_len = min(settings.max_len, config.max_positions)
        try:
            model = load_model(path, device=device, dtype=dtype, max_len=max_len)
            _set_threads(1 if model.weight_bytes < _SMALL_BYTES else settings.threads)
            graphs = settings.compile and device.type == "cuda"
            if graphs:
                model.compile()  # after the threads are set: compiled code holds for one number of them
            grammar = Grammar(tokenizer)
            static = device.type != "cpu"
            kernel = decode_kernel(config, device, dtype) if settings.attention != "eager" else None
            tokens, adapter_bytes = arena_tokens(
                model, rows=settings.slots, max_len=max_len, memory_bytes=settings.memory_bytes,
                gathers=static and kernel is None,
            )  # fmt: skip
            decoder = Decoder(
                model, grammar, rows=settings.slots, arena_tokens=tokens,
                static_len=max_len if static else None, kernel=kernel, capture=graphs, attention=settings.attention,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"the planner at {path} does not fit on {device}: {error}", device=str(device)) from error
        flows = FlowBuilder(
            grammar,
            PromptBuilder(tokenizer),
            max_len,
            max(2, decoder.max_rows // 2),
            decoder.arena.allocator.capacity // 2,
            PlannerAdapters(model, adapter_bytes),
        )
        info = PlannerInfo(
            name=name or path.name,
            hash=model_hash,
            notice=TINY_NOTICE if raw.get("acestep_tiny") else None,
            device=str(device),
            dtype=settings.dtype,
            slots=decoder.max_rows,
            max_len=max_len,
            weight_bytes=model.weight_bytes,
            invariant_rows=decoder.invariant_rows,
            graphs=decoder.graphs,
            load_s=time.monotonic() - begin,
        )
        log.info("planner loaded: %s", asdict(info))
        label = {"model": info.name, "model_hash": info.hash, "notice": info.notice}
        return cls(PlannerEngine(decoder, flows, label), info)

    def submit(
        self,
        work: PlannerWork,
        *,
        id: str | None = None,
        priority: float = 0.0,
        deadline: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Ticket[PlannerWork, Plan | Sample]:
        """Queue work; `.result()` of the ticket waits for it. Lower priority values go first.

        Raises:
            Unavailable: Too much waits already, or the planner is closing.
        """
        return self._thread.submit(work, id=id, priority=priority, deadline=deadline, on_progress=on_progress)

    def cancel(self, ticket: Ticket[PlannerWork, Plan | Sample]) -> None:
        """Drop the work before the next step; its ticket fails as cancelled."""
        self._thread.cancel(ticket)

    @property
    def alive(self) -> bool:
        return self._thread.alive

    def stats(self) -> dict[str, Any]:
        """Numbers for health and metrics; answers during a step."""
        return {"model": self.info.name, "alive": self._thread.alive, **self._thread.stats()}

    def close(self) -> None:
        """Stop after the step in progress."""
        self._thread.close()


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        make_current(name)
    except (RuntimeError, AssertionError) as error:
        raise DeviceUnavailable(f"device {name!r} cannot be used: {error}", device=name) from error
    return device
