"""The page with a thousand songs and forty cards: what stands in it, how it looks, and that it fits and can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gallery import IN_WORK, LYRICS, SONGS, WISHES, gallery

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
pytestmark = [pytest.mark.e2e, pytest.mark.browser]
PICTURES = os.environ.get("SCREENSHOTS")
IN_PAGE = 100  # cards at most: three screens of them
SHOWN: dict[str, str | int] = {
    "songs": "",
    "song": 0,
    "batch": 1,
    "right to left": 2,
    "failed": 5,
    "long title": 9,
    "fleet": "#/fleet",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gallery(tmp_path_factory.mktemp("gallery")) as found:
        yield found


def test_only_what_is_near_the_screen_stands_in_the_page(url: str, visit: Any) -> None:
    page = visit(url)
    cards = page.locator("article.song")
    expect(cards.first).to_be_visible()
    page.mouse.move(900, 600)
    last = page.locator(f'article.song[aria-posinset="{SONGS + IN_WORK}"]')
    for _ in range(300):
        assert cards.count() <= IN_PAGE
        if last.count():
            break
        page.mouse.wheel(0, 4000)
        page.wait_for_timeout(100)
    expect(last).to_have_attribute("aria-setsize", str(SONGS + IN_WORK))
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    expect(page.locator('article.song[aria-posinset="1"]')).to_be_in_viewport()
    page.locator('article.song[aria-posinset="1"] a.title').focus()
    for _ in range(45):  # further than what stood there
        page.keyboard.press("ArrowDown")
    expect(page.locator('article.song[aria-posinset="46"] a.title')).to_be_focused()
    assert cards.count() <= IN_PAGE
    page.get_by_label("Search songs").fill("industrial techno")
    expect(cards.first).to_contain_text("industrial techno")
    assert cards.count() <= IN_PAGE


def test_every_machine_of_forty_is_shown_and_what_failed(url: str, visit: Any) -> None:
    page = visit(f"{url}/#/fleet")
    expect(page.locator(".machines tbody tr")).to_have_count(40)
    expect(page.locator("article.pool")).to_have_count(6)
    expect(page.locator("article.pool", has_text="dit-tier2")).to_contain_text("acestep/gpu-tier=tier2")
    expect(page.get_by_role("list", name="Errors by type")).to_contain_text("out of memory")


def test_what_no_renderer_can_do_is_greyed_with_the_reason(url: str, visit: Any) -> None:
    page = visit(f"{url}/{address(0)}")
    stem = page.get_by_role("button", name="Take a stem out")
    expect(stem).to_be_disabled()
    expect(stem).to_have_accessible_description(
        "Not with acestep-v15-turbo, but with a base model: add a layer, take a stem out."
    )
    expect(page.get_by_role("button", name="Vary a little")).to_be_enabled()


def address(shown: str | int) -> str:
    return shown if isinstance(shown, str) else f"#/song/{shown:08x}-0000-4000-8000-000000000000"


def opened(page: Any, url: str, name: str) -> None:
    """One of the views, with what is folded in it unfolded."""
    page.goto(f"{url}/{address(SHOWN[name])}")
    page.locator({"songs": "article.song", "fleet": "article.pool"}.get(name, "dl.facts")).first.wait_for()
    if name == "song":
        page.get_by_role("button", name="Replace parts").click()
        page.get_by_role("button", name="Add a part by numbers").click()
    if name == "songs":
        page.locator("article.song", has_text="Waltz for the Rain").first.get_by_role("button", name="Play").click()
        expect(page.locator("#player .play")).to_have_class("play on")
        page.get_by_text("Lyrics, length and more").click()
        page.get_by_label("Lyrics", exact=True).fill(LYRICS["en"])
        page.get_by_label("Describe the song").fill(WISHES[0][1])
        expect(page.locator(".quote")).to_contain_text("of work")
        page.evaluate("scrollTo({top: 0, behavior: 'instant'})")


def fits_and_is_accessible(page: Any, what: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{what} is too wide"
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")
    ]
    assert serious == [], what


@pytest.mark.parametrize("name", SHOWN)
def test_every_view_fits_and_is_accessible(url: str, visit: Any, name: str) -> None:
    """Pictures are for people: `SCREENSHOTS=folder` makes them; `docs/page.webp` is one of them."""
    page = visit(url)
    opened(page, url, name)
    for width, schemes in {1280: ("dark", "light"), 390: ("light", "dark"), 360: ("dark",)}.items():
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in schemes:
            page.emulate_media(color_scheme=scheme)
            if PICTURES:
                page.screenshot(path=str(Path(PICTURES) / f"{name}-{width}-{scheme}.png"))
        if width != 390:  # no finding depends on 30 pixels
            fits_and_is_accessible(page, f"{name}, {width} wide, {scheme}")
    if name == "songs":
        page.get_by_text("Advanced", exact=True).click()
        page.get_by_label("Guidance Scale").wait_for()
        fits_and_is_accessible(page, "Advanced")
