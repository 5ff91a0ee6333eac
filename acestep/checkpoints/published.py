"""What is published, where, and the defaults that belong to a checkpoint: the table in `published.json`, typed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

Kind = Literal["renderer", "planner"]

TINY_RENDERERS = ("tiny", "tiny-base", "tiny-xl")
TINY_PLANNER = "tiny-lm"
LYRIC_HEADS = "lyric_alignment_layers_config"  # in a renderer's configuration: {"layer": [head, ...]}


@dataclass(frozen=True)
class VariantDefaults:
    """Sampling defaults of a renderer checkpoint.

    Attributes:
        steps: Denoising steps where the request names none.
        max_steps: More than these bring nothing for this variant.
        shift: Timestep shift.
        guidance_scale: Classifier-free guidance; 1 is off (it is distilled into the turbo weights).
        tasks: Tasks that this variant was trained for.
        dcw: Whether DCW is on where the request says nothing of it.
        lego_sft: Trained on captions that describe the whole song and the part of it (`is_lego_sft` in its configuration).
        lyric_heads: Heads of cross-attention, by layer, that follow the lyrics; empty where they are not known.
    """

    steps: int
    max_steps: int
    shift: float
    guidance_scale: float
    tasks: tuple[str, ...]
    dcw: bool = False
    lego_sft: bool = False
    lyric_heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)

    @property
    def distilled(self) -> bool:
        """Whether guidance is in the weights: one evaluation per step, and nothing to switch on."""
        return self.guidance_scale <= 1.0


@dataclass(frozen=True)
class Published:
    """One published model, in the original layout. `folder` is where it lies inside `repository`.

    The official diffusers twins of some are not listed: that of XL turbo came without the audio tokenizer, which the planner's codes
    need. They can still be named as repositories.
    """

    name: str
    kind: Kind
    repository: str
    folder: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)


@cache
def _table() -> dict[str, Any]:
    text = resources.files("acestep.checkpoints").joinpath("published.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def published() -> dict[str, Published]:
    """All published models by name."""
    return {name: Published(name=name, **row) for name, row in _table()["models"].items()}


def companions() -> Published:
    """Where VAE and text encoder of the original layout are published."""
    return Published(name="companions", kind="renderer", repository=_table()["companions"]["repository"])


def companion_folders() -> dict[str, str]:
    """Component name to folder name in an upstream `checkpoints/` root."""
    row = _table()["companions"]
    return {"vae": row["vae"], "text_encoder": row["text_encoder"]}


def vae_repositories() -> dict[str, str]:
    """Repositories of other VAEs than the checkpoints' own, by name."""
    return {name: str(row["repository"]) for name, row in _table()["vaes"].items()}


def default_name(kind: Kind) -> str:
    """The model that is taken from a root that holds several."""
    return str(_table()["default_names"][kind])


def _heads(given: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    return {int(layer): tuple(int(head) for head in of) for layer, of in given.items()}


def lyric_heads(config: Mapping[str, Any]) -> dict[int, tuple[int, ...]]:
    """Heads that follow the lyrics in a DiT of this configuration: those it names, else those known of its size.

    Raises:
        ValueError: it names heads or layers that it does not have.
    """
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    given = config.get(LYRIC_HEADS)
    if given is None:
        sizes = _table()["lyric_heads"]
        given = next((row["heads"] for row in sizes if row["size"] == [layers, heads, config["hidden_size"]]), {})
    try:
        found = _heads(given)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{LYRIC_HEADS} is not a list of heads by layer") from None
    if not all(0 <= layer < layers and of and all(0 <= head < heads for head in of) for layer, of in found.items()):
        raise ValueError(f"{LYRIC_HEADS} names what a DiT of {layers} layers and {heads} heads does not have")
    return found


def variant_defaults(is_turbo: bool, name: str | None = None) -> VariantDefaults:
    """Defaults of a variant, with those that the published model `name` has of its own."""
    row = dict(_table()["defaults"]["turbo" if is_turbo else "base"])
    if name in published():
        row |= published()[name].defaults
    return VariantDefaults(**{**row, "tasks": tuple(row["tasks"])})


@cache
def expected_defaults(model: str) -> VariantDefaults:
    """Defaults by a checkpoint's name, for where there is no more of it than that; a name that says nothing counts as turbo."""
    is_turbo = not any(variant in model.lower() for variant in ("base", "sft"))
    name = model.removeprefix("ACE-Step/")
    known = name in published() and "xl" not in name  # of XL, its configuration has to tell
    heads = _heads(_table()["lyric_heads"][0]["heads"]) if known else {}
    return replace(variant_defaults(is_turbo, name), lyric_heads=heads)
