"""The `acestep` command.

Its subcommands are found through the entry-point group `acestep.commands`, so that the library's command line can offer what the service
brings (`config`, `prepare`, `status`, ...) without importing it.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points
from typing import Any

import typer

from acestep import __version__
from acestep.errors import AceStepError

GROUP = "acestep.commands"


class _Lazy(typer.core.TyperGroup):
    """Imports a subcommand's module only when that subcommand, or the list of all, is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({e.name for e in entry_points(group=GROUP)})

    def get_command(self, ctx: Any, name: str) -> Any:
        found = next((e for e in entry_points(group=GROUP) if e.name == name), None)
        if found is None:
            return None
        app: typer.Typer = found.load()
        command = typer.main.get_command(app)
        command.name = name
        return command


app = typer.Typer(
    cls=_Lazy,
    help="ACE-Step 1.5: songs from a prompt, here or on a fleet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what happens to standard error."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def main() -> None:
    """Run the command line: expected errors become one line and exit code 1, Ctrl-C exit code 130."""
    try:
        app()
    except AceStepError as error:
        print(f"error ({error.type}): {error.message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
