"""A card that nobody has to own: tensors of the CPU that say they are on `cuda:0`, and a record of what would make the host wait for it.

    with FakeCard() as card:                              # in this thread and in those that are started meanwhile
        x = torch.zeros(3, device="cuda")
        x.sum().item()
    card.waits                                            # where the host would have stood still

The library runs as it is, with true numbers, so what it makes there must be what it makes on a CPU. Errors are those of a card: tensors of two
devices in one operation, a generator of the other device, and in a CUDA graph whatever may not be recorded. A graph here is the list of
its operations; replayed they write where they wrote before.

What needs the card itself is not here: kernels (and so their numbers), streams, memory.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
_LIBRARY = str(Path(__file__).parents[1] / "acestep")
_state = threading.local()

# Functions of a tensor on the card whose result the host must know before it can go on: numbers, or the shape of a tensor.
_READ = frozenset({
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose", "is_nonzero", "nonzero", "argwhere",
    "masked_select", "unique", "unique_consecutive", "bincount", "numpy", "__array__",
})  # fmt: skip
_FROM_HOST = frozenset({"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor"})


class CardTensor(Tensor):
    """Made by a `FakeCard` only."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CPU if getattr(_state, "inside", False) else CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return not getattr(_state, "inside", False)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FakeCard.current.run(func, args, kwargs or {})


class FakeCard:
    """Attributes:
    waits: How often the host would have waited, by place (`dit/vae.py decode`) and reason.
    attention: Calls of PyTorch's attention that no fused kernel takes, by place and why.
    """

    current: FakeCard

    def __init__(self, capability: tuple[int, int] = (9, 0), gib: int = 80) -> None:
        self.capability, self.bytes = capability, gib << 30
        self.waits: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.arriving: list[tuple[Tensor, Tensor]] = []  # copies to pinned memory that no event was waited for since
        self._recording: list[tuple[Any, Any, Any, Any]] | None = None

    # -- torch.cuda

    def __enter__(self) -> FakeCard:
        FakeCard.current = self
        run, mode = threading.Thread.run, lambda: _Mode(self)

        def run_on_card(thread: threading.Thread) -> None:
            with mode():
                run(thread)

        cuda = {
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
            "get_device_properties": lambda device=None: SimpleNamespace(total_memory=self.bytes),
            "mem_get_info": lambda device=None: (self.bytes, self.bytes),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: self._wait("synchronize"),
            "Stream": lambda device=None: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device=None: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: nullcontext(),
            "set_stream": lambda stream: None,
            "set_device": lambda device: None,
            "graph_pool_handle": lambda: (0, 1),
            "Event": lambda: _Event(self),
            "CUDAGraph": _Graph,
            "graph": self._record,
        }
        self._patches = [mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()]
        self._patches.append(mock.patch.object(threading.Thread, "run", run_on_card))
        self._patches.append(mock.patch.object(torch, "compile", lambda run, **how: run))
        for patch in self._patches:
            patch.start()
        # Modules that move get new parameters, since a parameter of the CPU cannot become one of the card here.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._mode = mode()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        for patch in reversed(self._patches):
            patch.stop()

    @contextmanager
    def _record(self, graph: _Graph, **how: object) -> Iterator[None]:
        self._recording = graph.work
        try:
            yield
        finally:
            self._recording = None

    # -- operations

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func`, which is a function of torch or a kernel of our own, on tensors of both devices."""
        if getattr(_state, "inside", False):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        cards = [t for t in tensors if isinstance(t, CardTensor)]
        target = self._target(name, args, kwargs)
        if name == "pin_memory":
            self._no_graph("pinned memory")
            copy = args[0].clone()
            copy.pinned = True
            return copy
        pinned = kwargs.pop("pin_memory", False)
        if name == "copy_" and cards and not isinstance(args[0], CardTensor) and getattr(args[0], "pinned", False):
            return self._send_home(*args)
        if target is not None and target.type == "cuda":
            args, kwargs = _without_device(args), {k: CPU if k == "device" else v for k, v in kwargs.items()}
        if cards or target is not None:
            self._check(func, name, args, kwargs, tensors, cards, target)
        _state.inside = True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
        finally:
            _state.inside = False
        on_card = bool(cards) if target is None else target.type == "cuda"
        if (
            target is not None
            and isinstance(out, Tensor)
            and tensors
            and isinstance(args[0], CardTensor) is not on_card
        ):
            with torch._C.DisableTorchFunctionSubclass():
                out = out.as_subclass(Tensor).clone()  # another device's numbers lie elsewhere
        out = _on_card(out) if on_card else out
        if pinned:
            self._no_graph("pinned memory")
            out.pinned = True
        if on_card:
            self._note(func, args, kwargs, out)
        return out

    def _target(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a function is told to put its result on; None where it is told none."""
        if name == "cpu":
            return CPU
        if name == "cuda":
            return CARD
        if kwargs.get("device") is not None:
            return torch.device(kwargs["device"])
        if name == "to":
            for arg in args[1:]:
                if isinstance(arg, torch.device | str):
                    return torch.device(arg)
                if isinstance(arg, Tensor):
                    return arg.device
        return args[1].device if name == "type_as" else None

    def _check(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], cards: list[Tensor], target: torch.device | None
    ) -> None:  # fmt: skip
        generator = kwargs.get("generator")
        if generator is not None and target is not None and generator.device.type != target.type:
            raise RuntimeError(
                f"Expected a '{target.type}' device type for generator but found '{generator.device.type}'"
            )
        hosts = [t for t in tensors if not isinstance(t, CardTensor) and t.ndim > 0]
        if name == "to":
            self._move(args[0], target, kwargs.get("non_blocking", False))
        elif name in ("cpu", "cuda"):
            self._move(args[0], target, False)
        elif name == "copy_":
            self._move(args[1], args[0].device, kwargs.get("non_blocking", False) or len(args) > 2)
        elif name in _FROM_HOST and target is not None and target.type == "cuda":
            self._wait("made of numbers of the host")
        elif name in ("__getitem__", "__setitem__"):
            self._index(name, args)
        elif name in ("__set__", "_has_compatible_shallow_copy_type") or (target is not None and not cards):
            pass
        elif name in _READ or (name == "where" and len(args) == 1):
            if cards:
                self._wait(f"read by {name}")
        elif hosts and cards:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            )
        if func is F.scaled_dot_product_attention:
            self._attend(*args, **kwargs)

    def _move(self, tensor: Tensor, target: torch.device | None, non_blocking: bool) -> None:
        if target is None or target.type == tensor.device.type:
            return
        if target.type == "cpu" or tensor.ndim == 0 or not (non_blocking and getattr(tensor, "pinned", False)):
            self._wait(f"copied to {'the card' if target.type == 'cuda' else 'the host'}")
        self._no_graph("a copy from or to the host")

    def _send_home(self, to: Tensor, tensor: Tensor) -> Tensor:
        """Numbers that come later: till then there are others."""
        self._no_graph("a copy to the host")
        with torch._C.DisableTorchFunctionSubclass():
            self.arriving.append((to, tensor.as_subclass(Tensor).clone()))
            to.fill_(False if to.dtype == torch.bool else 1e9)
        return to

    def _index(self, name: str, args: Any) -> None:
        tensor, index = args[0], args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if name == "__setitem__" and isinstance(args[2], Tensor):
            self._move(args[2], tensor.device, False)
        if not isinstance(tensor, CardTensor):
            if any(isinstance(part, CardTensor) for part in parts):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            return
        for part in parts:
            if isinstance(part, list) or (isinstance(part, Tensor) and part.ndim and not isinstance(part, CardTensor)):
                self._wait("indexed by numbers of the host")
            elif isinstance(part, CardTensor) and part.ndim == 0 and part.dtype != torch.bool:
                self._wait("indexed by one number of the card")
            elif isinstance(part, CardTensor) and part.dtype == torch.bool:
                filled = name == "__setitem__" and (not isinstance(args[2], Tensor) or args[2].ndim == 0)
                if not filled:
                    self._wait("indexed by a mask")

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        """PyTorch's rules: flash attention takes halves without a mask from compute capability 8.0 on, and groups heads; the memory-efficient
        kernel takes a mask in the queries' dtype, and groups none."""
        half = q.dtype in (torch.float16, torch.bfloat16)
        flash = half and attn_mask is None and self.capability >= (8, 0) and q.shape[-1] <= 256
        fits = attn_mask is None or attn_mask.dtype in (q.dtype, torch.bool)
        efficient = fits and (not enable_gqa or q.shape[1] == k.shape[1])
        if not (flash or efficient):
            self.attention[f"{place()}: {q.dtype}, mask {attn_mask is not None}, grouped {enable_gqa}"] += 1

    def _wait(self, why: str) -> None:
        self._no_graph(why)
        self.waits[f"{place()}: {why}"] += 1

    def _no_graph(self, what: str) -> None:
        if self._recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what} in {place()}")

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self._recording is not None and (
            getattr(func, "__name__", "") == "__setitem__" or next(_tensors((out,)), None) is not None
        ):
            self._recording.append((func, args, kwargs, out))


class _Mode(TorchFunctionMode):
    def __init__(self, card: FakeCard) -> None:
        super().__init__()
        self._card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._card.run(func, args, kwargs or {})


class _Event:
    def __init__(self, card: FakeCard) -> None:
        self._card = card

    def record(self, stream: object) -> None:
        self._arriving, self._card.arriving = self._card.arriving, []

    def synchronize(self) -> None:
        with torch.inference_mode():
            for to, numbers in self._arriving:
                to.copy_(numbers)


class _Graph:
    def __init__(self) -> None:
        self.work: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        _state.inside = True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                for func, args, kwargs, out in self.work:
                    read = {t.untyped_storage().data_ptr() for t in _tensors((args, tuple(kwargs.values())))}
                    again = func(*args, **kwargs)
                    for old, new in zip(_tensors((out,)), _tensors((again,)), strict=True):
                        if old.untyped_storage().data_ptr() not in read:  # else it is a view, or written in place
                            old.copy_(new)
        finally:
            _state.inside = False


def place() -> str:
    """The function of the library that runs."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "test"
    return f"{frame.f_code.co_filename.removeprefix(_LIBRARY + '/')} {frame.f_code.co_name}"


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _without_device(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        CPU if isinstance(arg, torch.device) or (isinstance(arg, str) and arg.startswith("cuda")) else arg
        for arg in args
    )


def _on_card(out: Any) -> Any:
    if isinstance(out, CardTensor):
        return out
    if isinstance(out, Tensor):
        return out.as_subclass(CardTensor)
    if isinstance(out, tuple) and any(isinstance(part, Tensor) for part in out):
        made = [_on_card(part) for part in out]
        return type(out)(made)
    return [_on_card(part) for part in out] if isinstance(out, list) else out
