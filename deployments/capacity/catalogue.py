"""What cards cost by the hour: the shipped table, a file of one's own, or prices said on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acestep.errors import InvalidRequest
from acestep.gpu_config import get_gpu_tier
from acestep.sizing.profiles import cards
from acestep.validation import did_you_mean, first_problem

_CARD = re.compile(r"^(?P<card>[a-z0-9-]+)(?:=(?P<count>\d{1,5}))?(?:@(?P<price>\d{1,6}(?:\.\d{1,6})?))?$")


@dataclass(frozen=True)
class Offer:
    """One kind of card that can be had.

    Attributes:
        card: Its row of `acestep/sizing/profiles/cards.json`.
        price, spot_price: Dollars for an hour; no spot price where none is offered.
        at_most: How many there are; None: as many as one likes.
        source: Where the price is from.
    """

    card: str
    tier: str
    price: float
    spot_price: float | None = None
    at_most: int | None = None
    source: str = ""


class _Prices(BaseModel):
    model_config = ConfigDict(extra="forbid")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    currency: str = "USD"
    sources: dict[str, str] = {}
    columns: tuple[str, ...] = ("card", "on_demand", "spot", "source")
    cards: list[tuple[str, float, float | None, str]]


def offers(path: Path | None = None, only: Iterable[str] = ()) -> tuple[list[Offer], str]:
    """All cards with a price, and where the prices are from.

    Args:
        path: A file in the shape of the shipped `prices.json`, in its place.
        only: `CARD`, `CARD=COUNT`, `CARD@PRICE` or `CARD=COUNT@PRICE`: these alone, so many of each at most, at that price.

    Raises:
        InvalidRequest: the file or a card is not understood.
    """
    text = _shipped() if path is None else _read(path)
    where = "prices.json" if path is None else str(path)
    try:
        table = _Prices.model_validate_json(text)
    except ValidationError as error:
        field, message = first_problem(error)
        raise InvalidRequest(f"--prices: {where}: {field}: {message}", field="prices") from None
    if not table.cards:
        raise InvalidRequest(f"--prices: {where}: cards: there are none in it", field="prices")
    known = cards()
    found: dict[str, Offer] = {}
    for name, price, spot, source in table.cards:
        if name not in known:
            raise InvalidRequest(f"--prices: {where}: {_no_card(name)}", field="prices")
        if min(price, price if spot is None else spot) < 0:
            raise InvalidRequest(f"--prices: {where}: {name} must not cost less than 0", field="prices")
        found[name] = _offer(name, price, spot, None, source)
    chosen = [_chosen(part.strip(), found) for text in only for part in text.split(",") if part.strip()]
    told = f"{where} of {table.date}, {table.currency}: " + "; ".join(f"{k}: {v}" for k, v in table.sources.items())
    return chosen or list(found.values()), told


def _shipped() -> str:
    return resources.files("deployments.capacity").joinpath("prices.json").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--prices: {path}: {error}", field="prices") from None


def _offer(name: str, price: float, spot: float | None, count: int | None, source: str) -> Offer:
    return Offer(name, get_gpu_tier(cards()[name].memory_gb, detected=True), price, spot, count, source)


def _no_card(name: str) -> str:
    near = did_you_mean(name, cards())
    return f"no card {name!r}{f', {near}' if near else ';'} there are {', '.join(cards())}"


def _chosen(text: str, found: dict[str, Offer]) -> Offer:
    match = _CARD.match(text)
    if match is None:
        raise InvalidRequest(
            f"--cards: {text!r} is not CARD, CARD=COUNT, CARD@PRICE or CARD=COUNT@PRICE", field="cards", asked=text
        )
    if match["card"] not in cards():
        raise InvalidRequest(f"--cards: {_no_card(match['card'])}", field="cards", asked=text)
    if match["count"] and int(match["count"]) == 0:
        raise InvalidRequest(
            f"--cards: {text}: there must be at least 1; leave out what there is none of", field="cards", asked=text
        )
    name, known = match["card"], found.get(match["card"])
    if match["price"] is None and known is None:
        raise InvalidRequest(f"--cards: {name} has no price in the table: give {name}@PRICE", field="cards", asked=text)
    price = float(match["price"]) if match["price"] else known.price if known else 0.0
    spot = known.spot_price if known and not match["price"] else None
    return _offer(
        name,
        price,
        spot,
        int(match["count"]) if match["count"] else None,
        "said" if match["price"] else known.source if known else "",
    )
