"""Downloads from the Hugging Face Hub into its own cache, with its own progress bars and credentials."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acestep.errors import ModelMissing
from acestep.paths import home, refusal

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "silence_latent.pt")


@dataclass(frozen=True)
class Place:
    """A downloaded folder and the commit it belongs to."""

    folder: Path
    commit: str


def is_repository_id(name: str) -> bool:
    return bool(_REPOSITORY.match(name)) and ".." not in name


def cache_dir() -> Path:
    """Where downloads go: the Hub's own cache, which other programs share. Where nobody named it and this user cannot have it (no home, a
    read-only root), a folder of the state directory."""
    from huggingface_hub import constants

    usual = Path(constants.HF_HUB_CACHE)
    if _is_named() or usual.is_dir() or _can_be_made(usual):
        return usual.absolute()
    return home() / "hub"


def _is_named() -> bool:
    return any(os.environ.get(name) for name in _CACHE_VARIABLES)


def _can_be_made(folder: Path) -> bool:
    # Without a home the Hub's path begins with a `~` that stays one, below whatever folder the process happens to be in.
    nearest = next(p for p in folder.parents if p.exists())
    return folder.is_absolute() and os.access(nearest, os.W_OK | os.X_OK)


def download_model(
    repository: str, *, folder: str | None = None, revision: str | None = None, download: bool = True
) -> Place:
    """The files of one model of a repository: weights, configs and tokenizer, never code or pickles.

    Args:
        folder: Only this folder of the repository; `Place.folder` is then that folder.
        download: False: from the local cache alone.

    Raises:
        ModelMissing: not cached and offline, no such repository, revision or folder, no access, no network, disk full. With
            `retry_after` where the Hub may answer later.
        StoragePermission: the cache cannot be written.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    # fnmatch's `*` crosses slashes: one pattern takes the folder's sub-folders along.
    patterns = [f"{folder}/{p}" if folder else p for p in _PATTERNS]
    offline = constants.HF_HUB_OFFLINE or not download
    no_proxy = None if offline else _unusable_proxy()  # then what is cached still serves
    where = f"{repository}/{folder}" if folder else repository
    if revision is not None:
        where += f" at revision {revision}"
    cache = cache_dir()
    if not _is_named() and cache.is_relative_to(home()):
        os.environ.setdefault("HF_XET_CACHE", str(cache / "xet"))  # the transfer library keeps a cache of its own
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache,
                allow_patterns=patterns,
                local_files_only=offline or no_proxy is not None,
            )
        )
    except errors.GatedRepoError as error:
        raise _missing(
            where, repository, "access to it is restricted: accept its terms and run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _missing(where, repository, "there is no such repository, or it is private: check the name") from error
    except errors.RevisionNotFoundError as error:
        raise _missing(where, repository, "there is no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        hint = no_proxy or (
            "it is not in the local cache and downloads are off: unset HF_HUB_OFFLINE, or give a folder"
            if offline
            else "it is not in the local cache and the Hub cannot be reached: check network and proxy, or give a folder"
        )
        raise _missing(where, repository, hint, passes=not offline) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.FileMetadataError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise refusal(Path(error.filename or cache), error, "set HF_HOME to a directory that is") from error
        reason = str(error).strip().splitlines()
        raise _missing(
            where, repository, f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}",
            passes=isinstance(error, errors.HfHubHTTPError) and _server_is_at_fault(error),
        ) from error  # fmt: skip
    place = snapshot / folder if folder else snapshot
    if not place.is_dir():
        raise _missing(where, repository, "the repository has no such folder, or it is not in the local cache")
    return Place(place, snapshot.name)


def _unusable_proxy() -> str | None:
    """Why the Hub's client cannot work with the proxy that the environment names; None where it can."""
    from huggingface_hub import get_session

    try:
        get_session()
    except Exception as error:  # a missing package, an unknown scheme, no URL: each of its own kind
        return (
            f"the proxy that ALL_PROXY, HTTP_PROXY or HTTPS_PROXY names cannot be used ({error}): unset it, or name one with http://, "
            "https:// or socks5://"
        )
    return None


def _server_is_at_fault(error: Any) -> bool:
    status = getattr(error.response, "status_code", None)
    return status is None or status == 429 or status >= 500


def _missing(where: str, repository: str, why: str, *, passes: bool = False) -> ModelMissing:
    """`passes`: asked again later, it may be there; the error then has `retry_after`."""
    later = {"retry_after": 15} if passes else {}
    return ModelMissing(f"checkpoint {where} is not available: {why}.", repository=repository, **later)
