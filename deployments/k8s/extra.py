"""The packages of the extra `k8s`, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from acestep.errors import InvalidRequest


def needs(module: str) -> Any:
    """A module of the extra.

    Raises:
        InvalidRequest: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InvalidRequest(
            f"this needs the Python package {module.partition('.')[0]}: pip install 'acestep-serve[k8s]'", field="k8s"
        ) from None
