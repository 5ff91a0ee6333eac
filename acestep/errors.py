"""Every failure a caller can meet, as a class with a stable `type`.

The HTTP layer turns these into problem bodies in one place (`deployments/ingress/errors.py`); nothing else decides on a status code.
"""

from __future__ import annotations

from typing import Any, ClassVar


class AceStepError(Exception):
    """Base of all expected failures.

    Args:
        message: One or two sentences for the caller: what is wrong and what to do. No traceback, no secret.
        details: JSON-able facts, such as `field`, `limit`, `asked`, `path`.
    """

    type: ClassVar[str] = "internal"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword details must survive pickling between processes.
        return _rebuild, (self.__class__, self.message, self.details)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "message": self.message, **self.details}


def _rebuild(cls: type[AceStepError], message: str, details: dict[str, Any]) -> AceStepError:
    return cls(message, **details)


class InvalidRequest(AceStepError):
    """A value of the request is not acceptable; `field` names it."""

    type = "invalid_request"


class LimitExceeded(AceStepError):
    """The request asks for more than the hardware or the policy allows; `field` and `limit` name it."""

    type = "limit_exceeded"


class ModelMissing(AceStepError):
    """A checkpoint is absent, incomplete or of the wrong kind; `path` or `repository` names it."""

    type = "model_missing"


class StoragePermission(AceStepError):
    """A directory or file cannot be written; `path`, `uid`, `gid` and `mode` say why."""

    type = "storage_permission"


class DeviceUnavailable(AceStepError):
    """The asked device is absent, too small or unusable with this torch build."""

    type = "device_unavailable"


class OutOfMemory(AceStepError):
    """The work does not fit in the device's memory; `needed_bytes` and `free_bytes` say by how much."""

    type = "out_of_memory"


class InvalidOutput(AceStepError):
    """A stage produced non-finite or all-zero output: never handed out as a song."""

    type = "invalid_output"


class Cancelled(AceStepError):
    """The caller or the operator cancelled the work."""

    type = "cancelled"


class DeadlineExceeded(AceStepError):
    """The work could not be finished before its deadline."""

    type = "deadline_exceeded"


class Unavailable(AceStepError):
    """No replica can take the work now; `retry_after` in seconds."""

    type = "unavailable"


class Internal(AceStepError):
    """A defect of ours. The log has the traceback; the caller gets an id to quote."""

    type = "internal"


ERROR_TYPES: dict[str, type[AceStepError]] = {
    c.type: c
    for c in (
        InvalidRequest, LimitExceeded, ModelMissing, StoragePermission, DeviceUnavailable, OutOfMemory,
        InvalidOutput, Cancelled, DeadlineExceeded, Unavailable, Internal,
    )
}  # fmt: skip


def error_from_dict(data: dict[str, Any]) -> AceStepError:
    """The inverse of `AceStepError.to_dict`; an unknown type becomes `Internal`."""
    details = {k: v for k, v in data.items() if k not in ("type", "message")}
    return ERROR_TYPES.get(str(data.get("type")), Internal)(str(data.get("message", "")), **details)
