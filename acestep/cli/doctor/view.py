"""The report of `acestep doctor` for people."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from acestep.cli.doctor.report import Report
from acestep.units import GIB

_MARKS = {"ok": ("✓", "green"), "note": ("·", "cyan"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


def print_report(report: Report, console: Console | None = None) -> None:
    """Write tables of machine, cards, settings and findings, and a verdict."""
    console = console or Console()
    console.rule("machine", align="left")
    facts = {k: v for k, v in report.machine.items() if k != "packages"}
    installed = ", ".join(f"{k} {v}" for k, v in report.machine["packages"].items() if v)
    table = Table.grid(padding=(0, 2))
    for name, fact in {**facts, "packages": installed}.items():
        table.add_row(Text(name, style="bold"), Text(str(fact)))
    console.print(table)

    console.rule("cards", align="left")
    table = Table.grid(padding=(0, 2))
    for card in report.cards:
        device = card.device
        size = f"{device.gib:.4g} GiB, {device.free_bytes / GIB:.4g} free"
        notes = [
            f"compute capability {device.capability[0]}.{device.capability[1]}" if device.capability else "",
            f"MIG {device.mig}" if device.mig else "",
            f"driver {device.driver}" if device.driver else "",
            "simulated" if device.simulated else "",
            "this torch cannot use it" if device.usable is False else "",
        ]
        head = ", ".join([device.torch_name, device.name, size, card.tier, *(n for n in notes if n)])
        table.add_row(Text("→" if card.chosen else " ", style="green"), Text(head, style="bold"))
        for role in ("plan", "render", "both"):
            table.add_row("", Padding(Text(f"{role}: {getattr(card, role)}"), (0, 0, 0, 2)))
    console.print(table)

    if report.settings is not None:
        settings = report.settings
        console.rule(f"settings, role {report.role}", align="left")
        console.print(Text(f"limits: {settings.limits.reason}"))
        console.print(Text(f"planner: {'on' if settings.lm_enabled else 'off'}: {settings.lm_reason}"))
        table = Table.grid(padding=(0, 2))
        for value in settings.values:
            why = value.reason if value.source == "default" else f"by {value.source}: {value.reason}"
            table.add_row(Text(f"{value.name} = {value.value}"), Text(why))
        console.print(table)

    if report.ledger:
        console.rule("memory for the longest song, GiB", align="left")
        for what, sizes in report.ledger.items():
            console.print(Text(f"{what}: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())))

    console.rule("findings", align="left")
    for finding in report.findings:
        mark, style = _MARKS[finding.level]
        console.print(Text.assemble((f"{mark} ", style), (f"{finding.area}: ", "bold"), finding.text))
    verdict = (
        ("songs can be made here", "green") if report.ok else ("songs cannot be made here as things are", "bold red")
    )
    console.print(Text(verdict[0], style=verdict[1]))
