"""`acestep calibrate`: measure this machine, so that estimates, ETAs and scaling rest on its own times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from acestep.cli import output as out
from acestep.cli.settings import SetOption, given
from acestep.errors import InvalidRequest
from acestep.gpu_config import ROLES
from acestep.units import GIB

app = typer.Typer(add_completion=False)


@app.command()
def calibrate(
    role: Annotated[str, typer.Option(help="What to measure: plan, render or both.")] = "both",
    longest: Annotated[float, typer.Option(help="Longest song to render, in seconds.", min=20, max=240)] = 120.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default <ACESTEP_HOME>/profiles/<card>.json.")
    ] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the profile and write nothing.")] = False,
    settings: SetOption = None,
) -> None:
    """Run short songs through the configured checkpoints and write a measured cost profile.

    The checkpoints are those of `acestep generate --local`: from ACESTEP_CONFIG_PATH and ACESTEP_LM_MODEL_PATH. Nothing else should run on
    the card meanwhile.
    """
    from acestep.cli.local import Studio
    from acestep.cli.measure import measured_profile, timed
    from acestep.paths import writable
    from acestep.sizing.profiles import measured_dir

    if role not in ROLES:
        raise InvalidRequest(f"--role: {role!r} is not one of {', '.join(ROLES)}.", field="role", asked=role)
    if not print_only:
        if output is None:
            writable(measured_dir())
        else:
            out.check(output)
    with Studio(given(settings)) as studio:
        stages: dict[str, Any] = {}
        if role != "render":
            if not studio.settings.lm_enabled:
                raise InvalidRequest(f"--role: no planner runs here: {studio.settings.lm_reason}", field="role")
            stages["planner"] = timed(studio.planner)
        if role != "plan":
            stages["renderer"] = timed(studio.renderer)
        device = studio.settings.device
        profile = measured_profile(
            card=device.name,
            tier=studio.settings.tier,
            cpu=device.kind == "cpu",
            memory_gb=device.total_bytes / GIB,
            longest_s=longest,
            **stages,
        )
    text = profile.model_dump_json(indent=1)
    if print_only:
        typer.echo(text)
        return
    path = output or measured_dir() / f"{profile.name}.json"
    out.write(path, (text + "\n").encode())
    typer.echo(f"wrote {path}")
