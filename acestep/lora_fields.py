"""How a request names adapters: one, or several, each with a strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from acestep.field_types import Text

MAX_LORAS = 8


class Lora(BaseModel):
    """An adapter for this request (LoRA, LoKr, DoRA): a folder or file of safetensors under an allow-listed root."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Text = Field(min_length=1, max_length=1024, description="Folder or file, under one of `lora_roots`.")
    scale: float = Field(default=1.0, ge=0.0, le=4.0, description="Multiplies what the adapter changes.")


def _several(value: Any) -> Any:
    """One adapter is read here, so that what is wrong in it is at `lora.path`, not at `lora.0.path`."""
    if isinstance(value, (Mapping, Lora)):
        return (Lora.model_validate(value),)
    return () if value is None else value


Loras = Annotated[
    tuple[Lora, ...],
    BeforeValidator(
        _several, json_schema_input_type=Lora | Annotated[tuple[Lora, ...], Field(max_length=MAX_LORAS)] | None
    ),
]
