"""What a person does on the page, for tests in a browser."""

from __future__ import annotations

from typing import Any

WAIT_MS = 60_000


def wish(page: Any, text: str) -> None:
    page.get_by_label("Describe the song").fill(text)
    page.keyboard.press("Enter")


def card(page: Any, text: str) -> Any:
    return page.locator("article.song", has_text=text).first


def made(page: Any, text: str) -> Any:
    from playwright.sync_api import expect  # not everywhere

    song = card(page, text)
    expect(song).to_have_attribute("data-state", "succeeded", timeout=WAIT_MS)
    return song


def length(page: Any, seconds: str, versions: int = 1) -> None:
    page.get_by_text("Lyrics, length and more").click()
    page.get_by_label("Length", exact=True).fill(seconds)
    page.get_by_label("Versions", exact=True).fill(str(versions))
