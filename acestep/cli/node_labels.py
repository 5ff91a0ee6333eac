"""`acestep node-labels`: what `acestep join` tells Ray about this machine's card, for whoever starts nodes by other means."""

from __future__ import annotations

from typing import Annotated

import typer

from acestep.errors import DeviceUnavailable
from acestep.gpu_config import tier_row
from acestep.hardware.devices import Device, list_devices

app = typer.Typer(add_completion=False)


@app.command("node-labels")
def node_labels(
    device: Annotated[
        int | None, typer.Option(help="Index of the card, on a machine whose cards differ (one Ray node per card).")
    ] = None,
) -> None:
    """Print the Ray labels of this machine: role and tier of its card."""
    typer.echo(labels(list_devices(), device))


def labels(devices: list[Device], index: int | None = None) -> str:
    """`acestep/role=gpu,acestep/gpu-tier=tier4`, or `acestep/role=cpu,acestep/gpu-tier=tier1` without a card.

    Raises:
        DeviceUnavailable: no card has that index; or the cards are of several tiers and none was named.
    """
    cards = [d for d in devices if d.is_card]
    if index is not None:
        cards = [d for d in cards if d.index == index]
        if not cards:
            raise DeviceUnavailable(f"there is no card {index}; there are {len([d for d in devices if d.is_card])}")
    if not cards:
        return "acestep/role=cpu,acestep/gpu-tier=tier1"
    tiers = {tier_row(d, None).tier for d in cards}
    if len(tiers) > 1:
        found = ", ".join(f"{d.index}: {d.name} {tier_row(d, None).tier}" for d in cards)
        raise DeviceUnavailable(
            f"the cards of this machine are of several tiers ({found}). Ray cannot tell cards of one node apart: start one Ray node per card, "
            "each with acestep join HEAD:6379 --device N"
        )
    return f"acestep/role=gpu,acestep/gpu-tier={tiers.pop()}"
