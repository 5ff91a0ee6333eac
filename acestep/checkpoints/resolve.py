"""From what a user writes (a name, a repository, a folder) to a complete `Checkpoint` on this disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from acestep import paths
from acestep.checkpoints import layout
from acestep.checkpoints.checkpoint import Checkpoint
from acestep.checkpoints.hub import download_model, is_repository_id
from acestep.checkpoints.other_vae import OFFICIAL, with_vae
from acestep.checkpoints.prepare import converted, tiny_root
from acestep.checkpoints.published import (
    TINY_PLANNER,
    TINY_RENDERERS,
    Kind,
    Published,
    companion_folders,
    companions,
    default_name,
    lyric_heads,
    published,
    variant_defaults,
)
from acestep.errors import ModelMissing
from acestep.song import TINY_NOTICE
from acestep.validation import did_you_mean


def resolve(
    name_or_path: str,
    kind: Kind,
    *,
    root: Path | None = None,
    download: bool = True,
    revision: str | None = None,
    vae: str = OFFICIAL,
) -> Checkpoint:
    """Find, download or generate a checkpoint and bring it into the layout that is loaded.

    Looked for in this order: the tiny checkpoints; a folder (anything with a path separator that exists, or a leading
    `.` or `~`); `<root>/<name>`, as ACE-Step's own tools lay their `checkpoints/` folder out; the Hub cache; the Hub.

    Args:
        name_or_path: A tiny or published name, a Hub repository id, or a folder in original or diffusers layout. A
            folder that holds several models, such as a `checkpoints/` root, gives its default one.
        kind: What is needed: "renderer" or "planner".
        root: Folder of checkpoints; None means `acestep.paths.checkpoints_dir()`. Conversions of downloads go there too.
        download: False: only what is on this disk. `HF_HUB_OFFLINE=1` has the same effect.
        revision: Branch, tag or commit of the Hub repository.
        vae: Of a renderer: see `with_vae`.

    Raises:
        ModelMissing: with `path` or `repository`, saying what to do.
        StoragePermission: neither the checkpoint's folder nor `root` can be written and something must be.
    """
    root = root or paths.checkpoints_dir()
    found = _resolve(name_or_path.strip(), kind, root, download=download, revision=revision)
    return with_vae(found, vae, root, download=download) if kind == "renderer" else found


def _resolve(name: str, kind: Kind, root: Path, *, download: bool, revision: str | None) -> Checkpoint:
    if not name:
        raise ModelMissing(f"no {kind} is named: give a name, a repository or a folder.", path="")
    folder = _as_folder(name)
    is_tiny = name in TINY_RENDERERS or name == TINY_PLANNER
    if revision is not None and (is_tiny or folder is not None):
        raise ModelMissing(f"{name} has no revision {revision!r}: only Hub repositories have revisions.", path=name)
    if is_tiny:
        return _tiny(name, kind, root)
    if folder is not None:
        return _from_folder(folder, kind, root, download=download, revision=None, name=folder.name)
    row = _row(name, kind)
    if row is not None:
        return _from_published(row, kind, root, download=download, revision=revision)
    if is_repository_id(name):
        place = download_model(name, revision=revision, download=download)
        return _from_folder(
            place.folder, kind, root, download=download, revision=place.commit, name=name.split("/")[-1]
        )
    if (root / name).is_dir():
        return _from_folder(root / name, kind, root, download=download, revision=None, name=name)
    raise _no_such(name, kind, root)


def check_name(name: str, kind: Kind) -> None:
    """Refuse a name that can be no checkpoint, for who only writes it down: nothing is opened, and the Hub is not asked.

    Raises:
        ModelMissing: it is no name of that kind, no Hub repository and no folder here.
    """
    row, root = _row(name, kind), paths.checkpoints_dir()
    of_kind = row.kind == kind if row else name in ([TINY_PLANNER] if kind == "planner" else TINY_RENDERERS)
    if not (of_kind or (row is None and is_repository_id(name)) or _as_folder(name) or (root / name).is_dir()):
        raise _no_such(name, kind, root)


def _no_such(name: str, kind: Kind, root: Path) -> ModelMissing:
    tiny = [TINY_PLANNER] if kind == "planner" else list(TINY_RENDERERS)
    known = [*tiny, *(row.name for row in published().values() if row.kind == kind)]
    near = did_you_mean(name, known)
    return ModelMissing(
        f"no {kind} is called {name!r}{f', {near}' if near else '.'} {root / name} does not exist. Known names: {', '.join(known)}. "
        "A Hub repository (owner/name) or a folder will do as well.",
        path=str(root / name),
    )


def _tiny(name: str, kind: Kind, root: Path) -> Checkpoint:
    if (name == TINY_PLANNER) != (kind == "planner"):
        raise ModelMissing(
            f"{name} is no {kind}. The tiny {kind} is called {TINY_PLANNER if kind == 'planner' else 'tiny'}.",
            path=name,
        )
    home = tiny_root(root)
    folder = home / (name if kind == "planner" else f"{name}-diffusers")
    return _from_folder(folder, kind, root, download=False, revision=None, name=name)


def _row(name: str, kind: Kind) -> Published | None:
    """A published model by its name, by its repository, or as the default of the repository that holds several."""
    row = published().get(name.removeprefix("ACE-Step/"))
    if row is None and name == companions().repository:
        row = published()[default_name(kind)]
    return row


def _as_folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith((".", "~")):
        if not path.is_dir():
            raise ModelMissing(f"{path} is not a folder. Give the folder of a checkpoint.", path=str(path))
        return path.absolute()
    return path.absolute() if len(path.parts) > 1 and path.is_dir() else None


def _from_published(row: Published, kind: Kind, root: Path, *, download: bool, revision: str | None) -> Checkpoint:
    if row.kind != kind:
        raise ModelMissing(f"{row.name} is a {row.kind}, not a {kind}.", repository=row.repository)
    if revision is None:
        for folder in (root / row.name, root / f"{row.name}-diffusers"):
            if folder.is_dir():
                return _from_folder(folder, kind, root, download=download, revision=None, name=row.name)
    place = download_model(row.repository, folder=row.folder, revision=revision, download=download)
    return _from_folder(place.folder, kind, root, download=download, revision=place.commit, name=row.name)


def _from_folder(
    folder: Path, kind: Kind, root: Path, *, download: bool, revision: str | None, name: str
) -> Checkpoint:
    found = layout.classify(folder)
    if found == "root":
        name = default_name(kind)
        inner = folder / name
        if not inner.is_dir():
            inner = folder / f"{name}-diffusers"
        if not inner.is_dir():
            raise ModelMissing(
                f"{folder} holds several models but not {name}. Give the folder of one model in it.", path=str(inner)
            )
        return _from_folder(inner, kind, root, download=download, revision=revision, name=name)
    if kind == "planner":
        config = layout.check_planner(folder)
        notice = TINY_NOTICE if config.get("acestep_tiny") else None
        return Checkpoint(name=name, kind=kind, path=folder, notice=notice, revision=revision)
    if found == "original":
        parts = _companions(folder, root, download=download, revision=revision)
        return _renderer(converted(folder, parts, root, revision=revision), name, revision=revision)
    if found == "planner":
        raise ModelMissing(f"{folder} holds a planner (language model), not a renderer.", path=str(folder))
    return _renderer(folder, name, revision=revision)


def _renderer(folder: Path, name: str, *, revision: str | None = None) -> Checkpoint:
    config = layout.check_renderer(folder)
    try:
        heads = lyric_heads(config)
    except ValueError as error:
        raise ModelMissing(f"{folder / 'transformer'}: {error}.", path=str(folder)) from None
    return Checkpoint(
        name=name,
        kind="renderer",
        path=folder,
        defaults=replace(
            variant_defaults(bool(config.get("is_turbo", False)), name),
            lego_sft=bool(config.get("is_lego_sft", False)),
            lyric_heads=heads,
        ),
        notice=TINY_NOTICE if config.get("model_version") in TINY_RENDERERS else None,
        revision=revision,
    )


def _companions(original: Path, root: Path, *, download: bool, revision: str | None) -> dict[str, Path]:
    """Folders of VAE and text encoder: inside the model's folder, beside it, in the root, else from the Hub."""
    commit = revision if original.parent.name == revision else None  # of the repository that holds them too
    found: dict[str, Path] = {}
    for component, name in companion_folders().items():
        places = (original / name, original.parent / name, root / name)
        here = next((place for place in places if (place / "config.json").is_file()), None)
        found[component] = (
            here or download_model(companions().repository, folder=name, revision=commit, download=download).folder
        )
    return found
