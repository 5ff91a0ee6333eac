"""`acestep lyrics`: when the words of a song are sung that a server has made already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from acestep.cli import output as out
from acestep.cli.client import Client
from acestep.cli.generate import LYRICS_FILES, tell_of_lyrics, write

app = typer.Typer(add_completion=False)


@app.command()
def lyrics(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Id of the song's job.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; words go beside it, as song.lyrics.json.")
    ] = Path("song.lrc"),
    score: Annotated[bool, typer.Option("--score", help="Also judge how well the lyrics can be heard.")] = False,
    url: Annotated[str | None, typer.Option(help="Server; default ACESTEP_URL or http://127.0.0.1:8000.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Time the lyrics of a song that is made already."""
    out.check(output)
    with Client(url) as client:
        job = client.wait(client.listen(job_id, timestamps=True, score=score)["id"])
        write(job, output, lambda _, file: client.file(file["url"]), LYRICS_FILES)
    if json_output:
        typer.echo(json.dumps(job, indent=1, ensure_ascii=False))
    else:
        tell_of_lyrics(job["result"]["items"], typer.echo)
