"""Downloads from the Hugging Face Hub into its own cache, with its own progress bars and credentials."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from acestep.errors import ModelMissing

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "silence_latent.pt")


@dataclass(frozen=True)
class Place:
    """A downloaded folder and the commit it belongs to."""

    folder: Path
    commit: str


def is_repository_id(name: str) -> bool:
    return bool(_REPOSITORY.match(name)) and ".." not in name


def download_model(
    repository: str, *, folder: str | None = None, revision: str | None = None, download: bool = True
) -> Place:
    """The files of one model of a repository: weights, configs and tokenizer, never code or pickles.

    Args:
        folder: Only this folder of the repository; `Place.folder` is then that folder.
        download: False: from the local cache alone.

    Raises:
        ModelMissing: not cached and offline, no such repository, revision or folder, no access, no network, disk full.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    # fnmatch's `*` crosses slashes: one pattern takes the folder's sub-folders along.
    patterns = [f"{folder}/{p}" if folder else p for p in _PATTERNS]
    offline = constants.HF_HUB_OFFLINE or not download
    where = f"{repository}/{folder}" if folder else repository
    if revision is not None:
        where += f" at revision {revision}"
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=offline
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
        hint = (
            "it is not in the local cache and downloads are off: unset HF_HUB_OFFLINE, or give a folder"
            if offline
            else "it is not in the local cache and the Hub cannot be reached: check network and proxy, or give a folder"
        )
        raise _missing(where, repository, hint) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.FileMetadataError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise _missing(
            where, repository, f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}"
        ) from error
    place = snapshot / folder if folder else snapshot
    if not place.is_dir():
        raise _missing(where, repository, "the repository has no such folder, or it is not in the local cache")
    return Place(place, snapshot.name)


def _missing(where: str, repository: str, why: str) -> ModelMissing:
    return ModelMissing(f"checkpoint {where} is not available: {why}.", repository=repository)
