"""Checkpoints: names, layouts, download, conversion, and the tiny ones.

`resolve` finds or makes a complete folder without importing torch; `load_renderer` (in `acestep.checkpoints.load`) builds the modules.
"""

from acestep.checkpoints.checkpoint import Checkpoint, content_hash
from acestep.checkpoints.published import (
    TINY_PLANNER,
    TINY_RENDERERS,
    Kind,
    VariantDefaults,
    published,
    variant_defaults,
)
from acestep.checkpoints.resolve import resolve

__all__ = [
    "TINY_PLANNER",
    "TINY_RENDERERS",
    "Checkpoint",
    "Kind",
    "VariantDefaults",
    "content_hash",
    "published",
    "resolve",
    "variant_defaults",
]
