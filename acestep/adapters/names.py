"""What the modules of the DiT are called: by diffusers, by the original model, and by all who wrap or flatten these names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from acestep.checkpoints.layout import PATCH_RENAMES, RENAMES

# What trainers, other programs and wrappers of modules write before and between the names of the DiT's own modules.
_FOREIGN = (
    "base_model", "model", "transformer", "diffusion_model", "decoder", "dit", "lora", "unet", "lycoris",
    "original_mlp", "original_attn", "original_self_attn", "original_cross_attn", "original_module", "original_layer", "base_layer",
    "module", "inner", "wrapped", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
)  # fmt: skip
_FOREIGN_WORD = re.compile(rf"(?:(?<=[._])|^)(?:{'|'.join(_FOREIGN)})[._]")


def all_names(modules: Iterable[str]) -> dict[str, str]:
    """Each module's name in diffusers' transformer by all that it is called, with `_` for dots."""
    return {alias.replace(".", "_"): name for name in modules for alias in aliases(name)}


def aliases(name: str) -> tuple[str, str]:
    """The name of a module in diffusers' transformer and in the original one."""
    original = f".{name}."
    for theirs, diffusers in RENAMES.items():
        original = original.replace(diffusers, theirs)
    for theirs, diffusers in PATCH_RENAMES.items():
        original = original.replace(f".{diffusers}", f".{theirs}")
    return name, original.strip(".")


def module_name(name: str, names: Mapping[str, str]) -> str:
    """The name in diffusers' transformer of a module as a file calls it; without foreign words where there is no such module."""
    bare = without_foreign_words(f"{name}.").rstrip("._")
    if known := names.get(bare.replace(".", "_")):
        return known
    for theirs, diffusers in RENAMES.items():
        bare = f"{bare}.".replace(theirs, diffusers).removesuffix(".")
    return bare


def without_foreign_words(name: str) -> str:
    return _FOREIGN_WORD.sub("", name)
