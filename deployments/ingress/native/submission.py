"""What callers of the native API send for a song."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from acestep import words
from acestep.request import SongRequest
from acestep.source_fields import SongName, read_song_name

FROM = "from"  # also a name of the window's start, which is no object


class JobOptions(BaseModel):
    """How to deal with a job."""

    webhook_url: str | None = Field(None, max_length=2048, description="Hears of the job's end, signed, with retries.")
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="Refused at once where it cannot be there within so many seconds, by the cost model; given up once they are over.",
    )


def _with_from(schema: dict[str, Any]) -> None:
    short_ways: Any = SongRequest.model_config["json_schema_extra"]
    short_ways(schema)
    about = (
        'An own song to go on from, as `{"job": ID, "item": 0}`. With a `task` it is the task\'s source, and what is not said (description, '
        "lyrics, tempo, key, formats, ...) is as in that song. Without one that song is made again, with its plan and its seeds, but for what is said."
    )
    schema["properties"][FROM] = {
        "type": "object", "title": "From", "description": about, "required": ["job"], "additionalProperties": False,
        "properties": {
            "job": {"type": "string", "maxLength": 64, "description": "`id` of the job."},
            "item": {"type": "integer", "minimum": 0, "default": 0, "description": "Which of its songs, from 0."},
        },
    }  # fmt: skip


class SongSubmission(JobOptions, SongRequest):
    """A song request with how to deal with it."""

    model_config = ConfigDict(json_schema_extra=_with_from)

    origin: SkipJsonSchema[SongName | None] = Field(None, description="`from`, read.")

    @model_validator(mode="before")
    @classmethod
    def _from(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if "origin" in data:
            raise ValueError("origin: unknown field")
        if not isinstance(named := data.get(FROM), dict):
            try:
                words.read_seconds(named)
            except ValueError:
                raise ValueError(f'{FROM}: must be an own song, {{"job": ID, "item": 0}}') from None
            return data
        song = read_song_name(named, FROM)
        read = {name: value for name, value in data.items() if name != FROM} | {"origin": song}
        if read.get("task") is not None:
            if read.get("src_audio") is not None:
                raise ValueError("src_audio: is the song that `from` names; leave out one of the two")
            read["src_audio"] = str(song)
        return read

    def given(self) -> dict[str, Any]:
        """The fields of a song that were said, by name."""
        return self.model_dump(exclude_unset=True, exclude={*JobOptions.model_fields, "origin"})
