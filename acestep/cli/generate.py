"""`acestep generate`: a song from the command line, through a server or in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from acestep import words
from acestep.cli import output as out
from acestep.cli.client import Client
from acestep.cli.settings import SetOption, given
from acestep.errors import InvalidRequest
from acestep.formats import FORMATS, AudioFormat
from acestep.request import SongRequest
from acestep.validation import first_problem

app = typer.Typer(add_completion=False)
SUFFIXES = (".wav", ".flac", ".mp3", ".opus", ".ogg", ".m4a", ".aac")
_UNITS = {"planning": "codes", "rendering": "steps", "decoding": "frames", "encoding": "songs"}
LYRICS_FILES = ("lrc", "lyrics")
_BESIDE = {"lrc": ".lrc", "lyrics": ".lyrics.json", "latent": ".latent.safetensors"}
_JOB = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:/([0-9]))?", re.ASCII)
SHOWN_CAPTION = 240  # characters
_err = Console(stderr=True)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Description of the music.")] = "",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; its suffix chooses the format.")
    ] = Path("song.wav"),
    lyrics: Annotated[str, typer.Option(help="Lyrics, or @FILE to read them from a file.")] = "",
    duration: Annotated[
        str | None, typer.Option(help="Seconds, 10 to 600, also as 3:30; left out: the planner decides.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same song.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-n", help="Number of variants.")] = 1,
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Let the planner write audio codes.")
    ] = True,
    bpm: Annotated[str | None, typer.Option(help="30 to 300.")] = None,
    key: Annotated[str | None, typer.Option(help="Such as 'F# minor'.")] = None,
    time_signature: Annotated[str | None, typer.Option(help="2, 3, 4 or 6; also as 6/8.")] = None,
    language: Annotated[str | None, typer.Option(help="Language of the lyrics, such as en or Deutsch.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; left out: the checkpoint's default.")] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="What to work on, with --task: a file of audio or of a song's latents, or a song of the server: its job's id, ID/ITEM, or a URL."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Such as cover or repaint; left out: a new song.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter, by its name in the server's LoRA folders (with --local a path), also as NAME:SCALE; several add up."
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Peak at -1 dBFS; left out: yes, but not where a task keeps its source's level.",
        ),
    ] = None,
    normalization_db: Annotated[
        float | None,
        typer.Option(help="Another peak than -1 dBFS; a negative number needs =, as in --normalization-db=-3."),
    ] = None,
    timestamps: Annotated[
        bool,
        typer.Option("--timestamps", help="Also write when each line and word is sung: song.lrc, song.lyrics.json."),
    ] = False,
    score: Annotated[
        bool, typer.Option("--score", help="Also judge how well the lyrics can be heard, and the planner's codes.")
    ] = False,
    best_of: Annotated[
        int | None, typer.Option(help="Make so many variants and name the best first, by --score.")
    ] = None,
    latents: Annotated[
        bool, typer.Option("--latents", help="Also write what the song was decoded from: song.latent.safetensors.")
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", help="Any other field of a request, as name=value (JSON or text)."),
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Make it in this process, without a server.")] = False,
    settings: SetOption = None,
    url: Annotated[str | None, typer.Option(help="Server; default ACESTEP_URL or http://127.0.0.1:8000.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Make a song."""
    fields = {
        "prompt": prompt, "lyrics": _text_or_file(lyrics), "duration": duration, "seed": seed, "batch_size": batch_size,
        "thinking": thinking, "bpm": bpm, "key_scale": key, "time_signature": time_signature, "vocal_language": language,
        "steps": steps, "task": task, "src_audio": _source(source) if source else None, "normalize": normalize, "normalization_db": normalization_db,
        "timestamps": timestamps or None, "score": score or None, "best_of": best_of,
        "lora": [_lora(text) for text in lora] if lora else None,
        **dict(_parameter(p) for p in param or []),
    }  # fmt: skip
    fields = {k: v for k, v in fields.items() if v is not None}
    if best_of is not None and batch_size == 1:
        del fields["batch_size"]
    if not {"formats", "format", "audio_format"} & set(fields):
        fields["formats"] = [_format_of(output)]
    request = _validated(fields)
    if settings and not local:
        raise InvalidRequest("--set: a server has settings of its own; this needs --local", field="set")
    out.check(output)
    kinds = (*LYRICS_FILES, *(["latent"] if latents else []))
    job = _local(request, output, kinds, given(settings)) if local else _served(fields, output, kinds, url)
    if json_output:
        typer.echo(json.dumps(job, indent=1, ensure_ascii=False))
    else:
        _report(job)


def _served(fields: dict[str, Any], output: Path, kinds: Sequence[str], url: str | None) -> dict[str, Any]:
    with Client(url) as client, _Bars() as bars:
        job = client.submit(_uploaded(client, fields))
        _err.print(f"job {job['id']}", highlight=False)
        try:
            job = client.wait(job["id"], bars.job)
        except KeyboardInterrupt:
            client.cancel(job["id"])
            raise
        write(job, output, lambda _, file: client.file(file["url"]), kinds)
    return job


def _uploaded(client: Client, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with source audio that lies on this machine sent to the server; other names are left to it."""

    def name(value: Any) -> Any:
        return client.upload(Path(value)) if isinstance(value, str) and Path(value).is_file() else value

    sent = dict(fields)
    if "src_audio" in sent:
        sent["src_audio"] = name(sent["src_audio"])
    if "reference_audio" in sent:
        given = sent["reference_audio"]
        sent["reference_audio"] = [name(v) for v in ([given] if isinstance(given, str) else given)]
    return sent


def _local(request: SongRequest, output: Path, kinds: Sequence[str], settings: dict[str, str]) -> dict[str, Any]:
    from acestep.cli.local import Studio

    with _Bars() as bars:
        bars.stage("loading", 0, 0)
        with Studio(settings) as studio:
            made = studio.make(request, on_progress=lambda p: bars.stage(p.stage, p.done, p.total))
    job = made.view()
    write(job, output, lambda item, file: made.files[item["index"], file.get("format") or file["kind"]], kinds)
    for item in job["result"]["items"]:  # what was not written is nowhere
        item["files"] = [file for file in item["files"] if "file" in file]
    return job


def write(
    job: dict[str, Any],
    output: Path,
    read: Callable[[dict[str, Any], dict[str, Any]], bytes],
    kinds: Sequence[str] = (),
) -> None:
    """Write every song of a job and note in it where: `song.wav`; `song-1.wav` for further items. A suffix that says something else than
    what the file holds gives way to the format's own. Of what lies beside the songs, these kinds: `song.lrc`."""
    items, taken = job["result"]["items"], set[Path]()
    for item in items:
        stem = output.stem if len(items) == 1 else f"{output.stem}-{item['index']}"
        for number, audio in enumerate(item["audio"]):
            path = output.with_name(stem + _suffix(output.suffix, audio["format"], first=number == 0))
            if path in taken:
                path = path.with_stem(f"{stem}-{audio['format']}")
            taken.add(path)
            out.write(path, read(item, audio))
            audio["file"] = str(path)
        for file in item.get("files", []):
            if file["kind"] in kinds:
                path = output.with_name(f"{stem}{_BESIDE[file['kind']]}")
                out.write(path, read(item, file))
                file["file"] = str(path)


def _suffix(asked: str, fmt: AudioFormat, *, first: bool) -> str:
    own, says = FORMATS[fmt].extension, words.readable(words.read_format, asked)
    fits = first if says is None else FORMATS[says].extension == own
    return asked if fits else f".{own}"


class _Bars:
    """One live progress bar per stage, on standard error; silent where that is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"), TimeElapsedColumn(), console=_err, disable=not _err.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def job(self, job: dict[str, Any]) -> None:
        if job["state"] == "succeeded":
            for task in self._tasks.values():
                self._progress.update(task, completed=self._progress.tasks[task].total or 1)
            return
        progress = job["progress"] or {}
        self.stage(progress.get("stage", job["stage"]), progress.get("done", 0), progress.get("total", 0))

    def stage(self, name: str, done: int, total: int) -> None:
        if name not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, completed=self._progress.tasks[task].total or 1)
            self._tasks[name] = self._progress.add_task(name, total=total or None, unit=_UNITS.get(name, ""))
        self._progress.update(self._tasks[name], completed=done, total=total or None)


def _report(job: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def line(text: str) -> None:  # a caption is model output: no control character of it may reach the terminal
        console.print("".join(c if c.isprintable() else "\ufffd" for c in text), markup=False)

    plan, result = job["plan"] or {}, job["result"]
    facts = {k: v for k, v in (plan.get("metadata") or {}).items() if v is not None}
    caption = str(facts.pop("caption", ""))
    codes = sum(len(c) for c in plan.get("codes") or [])
    line(
        "plan     "
        + (", ".join(f"{k} {v}" for k, v in facts.items()) or "none")
        + (f", {codes} codes" if codes else "")
    )
    if caption:
        line(
            "caption  " + (caption if len(caption) <= SHOWN_CAPTION else caption[:SHOWN_CAPTION] + " ... (--json: all)")
        )
    for item in result["items"]:
        names = ", ".join(a["file"] for a in item["audio"])
        other = {k: v for k in ("lm_seed", "retake_seed") if (v := item.get(k)) not in (None, item["seed"])}
        seeds = "".join(f", {k} {v}" for k, v in {"seed": item["seed"], **other}.items())
        line(f"song     {names}: {item['duration']:.2f} s, {item['sample_rate']} Hz{seeds}")
    tell_of_lyrics(result["items"], line)
    times = {k: v for part in result["timings"].values() for k, v in part.items() if k.endswith("_s") and v >= 0.005}
    line("time     " + ", ".join(f"{k.removesuffix('_s')} {v:.2f} s" for k, v in times.items()))
    for warning in job["warnings"]:
        line(f"warning  {warning['field']}: {warning['asked']} -> {warning['given']} ({warning['reason']})")
    if job.get("notice"):
        line(f"note     {job['notice']}")


def tell_of_lyrics(items: list[dict[str, Any]], line: Callable[[str], None]) -> None:
    for item in items:
        if names := ", ".join(f["file"] for f in item.get("files", []) if "file" in f):
            line(f"beside   {names}")
        if item.get("scores"):
            line("scores   " + ", ".join(f"{name} {value:.2f}" for name, value in item["scores"].items()))
        if judged := item.get("planner_scores"):
            told = ", ".join(f"{name} {value:.2f}" for name, value in judged.items() if value is not None)
            line(f"planner  {told}")


def _validated(fields: dict[str, Any]) -> SongRequest:
    try:
        request = SongRequest.model_validate(fields)
    except ValidationError as error:
        name, message = first_problem(error)
        raise InvalidRequest(f"{name}: {message}", field=name) from None
    if not (request.prompt.strip() or request.src_audio or request.audio_codes or request.plan):
        raise InvalidRequest("prompt: must not be empty", field="prompt")
    return request


def _text_or_file(value: str) -> str:
    if not value.startswith("@"):
        return value
    try:
        return words.decode_text(Path(value[1:]).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--lyrics: cannot read {value[1:]}: {error}", field="lyrics") from error


def _source(text: str) -> str:
    """A file here as it is written; else the id of a job as the name of its song."""
    song = None if Path(text).is_file() else _JOB.fullmatch(text)
    return f"song:{song[1]}/{song[2] or 0}" if song else text


def _lora(text: str) -> dict[str, Any]:
    """NAME or NAME:SCALE. A name may hold colons, too."""
    name, _, scale = text.rpartition(":")
    try:
        return {"path": name, "scale": float(scale)} if name else {"path": text}
    except ValueError:
        return {"path": text}


def _parameter(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise InvalidRequest(f"--param: {text!r} is not name=value", field="param")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _format_of(output: Path) -> str:
    found: str | None = words.readable(words.read_format, output.suffix)
    if found is None:
        raise InvalidRequest(
            f"--output: {output.suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}", field="output"
        )
    return found
