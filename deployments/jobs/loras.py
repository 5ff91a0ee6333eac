"""What `/v1/lora` of ACE-Step's API was told: adapters for the requests of a key that follow. In the store, so that every router knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from acestep.errors import InvalidRequest
from acestep.request import MAX_LORAS, Lora
from deployments.jobs.database import writer
from deployments.jobs.schema import lora_defaults


@dataclass(frozen=True)
class LoraDefault:
    """Adapters by the names they were loaded under. As in ACE-Step's server the one that was loaded last is active, alone."""

    adapters: Mapping[str, Lora] = field(default_factory=dict)
    active: str | None = None
    use: bool = True

    @property
    def loras(self) -> tuple[Lora, ...]:
        """For a request that names none itself."""
        return (self.adapters[self.active],) if self.use and self.active is not None else ()

    def loaded(self, name: str, path: str) -> LoraDefault:
        """With one more, or another under a name that is known.

        Raises:
            InvalidRequest: there are too many.
        """
        if len({*self.adapters, name}) > MAX_LORAS:
            raise InvalidRequest(
                f"adapter_name: {MAX_LORAS} adapters are loaded, and more are not taken", limit=MAX_LORAS
            )
        return LoraDefault({**self.adapters, name: Lora(path=path)}, name, True)

    def scaled(self, name: str, scale: float) -> LoraDefault:
        adapter = self.adapters[name].model_copy(update={"scale": scale})
        return replace(self, adapters={**self.adapters, name: adapter})


class LoraDefaults:
    """The defaults of all keys. Its methods block."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = writer(engine)

    def get(self, owner: str) -> LoraDefault:
        with self._engine.connect() as db:
            return _read(
                db.execute(sa.select(lora_defaults.c.value).where(lora_defaults.c.owner_key == owner)).scalar()
            )

    def change(self, owner: str, changed: Callable[[LoraDefault], LoraDefault]) -> LoraDefault:
        """Replace a key's default by what `changed` makes of it. What that raises leaves it as it was."""
        mine = lora_defaults.c.owner_key == owner
        try:
            with self._writer.begin() as db:
                stored = db.execute(sa.select(lora_defaults.c.value).where(mine).with_for_update()).scalar()
                new = changed(_read(stored))
                if stored is None:
                    db.execute(lora_defaults.insert().values(owner_key=owner, value=_written(new)))
                else:
                    db.execute(lora_defaults.update().where(mine).values(value=_written(new)))
                return new
        except sa.exc.IntegrityError:  # another router wrote this key's first one at the same moment
            return self.change(owner, changed)


def _read(value: dict[str, Any] | None) -> LoraDefault:
    if not value:
        return LoraDefault()
    adapters = {name: Lora.model_validate(adapter) for name, adapter in value["adapters"]}
    return LoraDefault(adapters, value["active"], value["use"])


def _written(default: LoraDefault) -> dict[str, Any]:
    adapters = [[name, adapter.model_dump(mode="json")] for name, adapter in default.adapters.items()]
    return {"adapters": adapters, "active": default.active, "use": default.use}
