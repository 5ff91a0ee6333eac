"""The `acestep` command's Typer application: subcommands are imported when they are asked for, and their help without that."""

from __future__ import annotations

import ast
import importlib.util
import logging
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import typer

from acestep import __version__
from acestep.cli import interrupt

GROUP = "acestep.commands"


class _Lazy(typer.core.TyperGroup):
    """Imports a subcommand's module only when that subcommand is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({e.name for e in entry_points(group=GROUP)})

    def get_command(self, ctx: Any, name: str) -> Any:
        found = next((e for e in entry_points(group=GROUP) if e.name == name), None)
        if found is None:
            return None
        app: typer.Typer = found.load()
        command = typer.main.get_command(app)
        interrupt.is_raised()
        command.name = name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As ever, but for the list of subcommands, whose modules are read and not imported."""
        told = typer.Typer(add_completion=False)
        for point in sorted(entry_points(group=GROUP), key=lambda e: e.name):
            told.command(point.name, help=summary(point))(lambda: None)
        told.callback()(lambda: None)
        group = typer.main.get_command(told)
        group.params, group.help, group.name = self.params, self.help, self.name
        group.format_help(ctx, formatter)


def summary(point: EntryPoint) -> str:
    """What a subcommand's help begins with: the `help` of its Typer object, or the docstring of the function that this decorates.

    Raises:
        LookupError: there is neither.
    """
    spec = importlib.util.find_spec(point.module)
    assert spec is not None, f"{point.module} is a module"
    assert spec.origin is not None, f"{point.module} is a file"
    found = sorted(_helps(ast.parse(Path(spec.origin).read_bytes()), point.attr))
    if not found:
        raise LookupError(f"{point.value} has no help, and decorates no function that has a docstring")
    return found[0][1].split("\n\n")[0]


def _helps(module: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """Rank and text: the object's own help, then its callback's, then its command's."""
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                yield from (
                    (0, str(k.value.value))
                    for k in node.value.keywords
                    if k.arg == "help" and isinstance(k.value, ast.Constant)
                )
        elif isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == name:
                    yield {"callback": 1, "command": 2}.get(called.attr, 3), ast.get_docstring(node) or ""


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
