"""Imports single modules of diffusers and transformers, and not what their packages import along with them.

A model class of diffusers is one file, but the packages above it import every model, guider and hook; decorators import torch's compiler,
and optional packages are imported because they are there. That is two thirds of a renderer's start. Within `lean()` a package is a bare
folder, the compiler's decorators do nothing, and optional packages are absent; afterwards all of them can be imported as ever.

In a process that has imported either library before, all is imported as ever: the time is spent, and what they found then would not fit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import torch.distributed

# Packages whose __init__ imports all that is in them.
_BARE = (
    "diffusers.guiders", "diffusers.hooks", "diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets",
    "diffusers.pipelines.ace_step", "transformers.models",
)  # fmt: skip
# Imported wherever they are installed. None of it is asked of diffusers or transformers: LoRA and int8 are done here.
_OPTIONAL = ("boto3", "peft", "scipy", "torchao")
_COMPILER = "torch._dynamo"
_FIRST = not {"diffusers", "transformers"} & sys.modules.keys()


class _Decorators(ModuleType):
    """In the compiler's place: each of its names is a decorator that leaves a function as it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(*args: Any, **_: Any) -> Any:
    return args[0] if args and callable(args[0]) else _unchanged


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """For the imports of a block. What was imported before stays as it was."""
    if not _FIRST:
        yield
        return
    metadata = importlib.metadata
    with (
        # Both libraries list every file of every installed distribution, to know packages whose names differ from their distributions'.
        mock.patch.object(metadata, "distributions", return_value=()),
        mock.patch.object(metadata, "packages_distributions", return_value={}),
        mock.patch.object(torch.distributed, "is_available", return_value=False),  # sharded tensors, with all of sympy
        _placed({_COMPILER: _folder(_COMPILER, _Decorators)} | dict.fromkeys(_OPTIONAL)),
    ):
        import diffusers.utils  # noqa: F401  # the parents of what follows
        import transformers  # noqa: F401

        with _placed({name: _folder(name, ModuleType) for name in _BARE}):
            yield


@contextlib.contextmanager
def _placed(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Modules, or None for "there is none", under names that nothing has been imported by."""
    put = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(put)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in put.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _folder(name: str, kind: type[ModuleType]) -> ModuleType:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is a package"
    module = kind(name)
    module.__spec__, module.__package__, module.__path__ = spec, name, list(spec.submodule_search_locations or ())
    return module
