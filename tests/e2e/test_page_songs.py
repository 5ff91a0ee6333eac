"""Songs on the page, behind a key: heard while they are made, their versions, what is made of them, and a server that goes away meanwhile.

Parts replaced, more before and after, variations, covers, layers and stems; and where they come from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.browser import WAIT_MS, card, length, made, wish
from tests.server import Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
pytestmark = [pytest.mark.e2e, pytest.mark.browser]
KEY = "the page's own key"
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """It has a key and a card that renders several songs of a job; its checkpoint can do every task, as base models can, and is heard at once."""

    def edit(config: dict[str, Any]) -> None:
        of = {app["name"]: app for app in config["applications"]}
        digest = hashlib.sha256(KEY.encode()).hexdigest()
        of["router"]["args"] = {"api_keys": [{"name": "page", "sha256": digest}]}
        of["dit"]["args"] = {"model": "tiny-base", "live_patience_s": 0}

    with Server(edit, env={"MAX_CUDA_VRAM": "24"}) as running:
        yield running


def enter_key(page: Any, key: str = KEY) -> None:
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill(key)
    dialog.get_by_role("button", name="Go on").click()


@pytest.fixture
def page(server: Server, visit: Any) -> Any:
    """The page, with the key entered."""
    page = visit(server.url)
    enter_key(page)
    return page


def test_a_key_is_asked_for_once_and_never_in_an_address(server: Server, visit: Any) -> None:
    page = visit(server.url)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    enter_key(page, "a wrong one")
    expect(page.get_by_role("dialog")).to_contain_text("does not know this key")
    enter_key(page)
    expect(page.get_by_role("dialog")).to_have_count(0)
    length(page, "10")
    wish(page, "behind a key")
    made(page, "behind a key").get_by_role("button", name="Play").click()
    expect(page.locator("#player .time")).to_have_text(re.compile(r"0:0[1-9] /"))
    page.reload()
    made(page, "behind a key")
    assert not any("own key" in url or "own%20key" in url for url in asked)
    stranger = visit(server.url)
    expect(stranger.get_by_role("dialog")).to_be_visible()


def test_versions_are_switched_in_place(page: Any) -> None:
    length(page, "20", versions=2)
    wish(page, "two versions")
    made(page, "two versions").get_by_role("button", name="Play two versions").click()
    expect(page.locator("#player .time")).to_have_text(re.compile(r"0:0[2-9] /"))
    page.locator("#player .version").nth(1).click()
    expect(page.locator("#player .version").nth(1)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#player .time")).to_have_text(re.compile(r"0:(0[2-9]|1\d) /"))


def test_a_song_is_heard_before_it_has_ended_and_then_from_its_file(server: Server, page: Any) -> None:
    asked = []
    page.on("request", lambda request: asked.append(request.url.partition("?")[0]))
    length(page, "60")
    wish(page, "heard while it is made")
    song = card(page, "heard while it is made")
    song.get_by_role("button", name="Listen to heard while it is made").click()
    time = page.locator("#player .time")
    expect(time).to_have_text("waits for its sound")
    expect(time).to_have_text(re.compile(r"0:\d\d / 1:00"), timeout=2 * WAIT_MS)
    address = song.locator("a.title").get_attribute("href").rpartition("/")[2]
    heard = httpx.get(f"{server.url}/v1/jobs/{address}", headers=HEADERS).json()
    assert heard["state"] == "running"  # asked after the sound was there
    page.locator("#player song-wave").click()
    expect(page.locator("#toasts")).to_contain_text("once it is done you can jump")
    made(page, "heard while it is made")
    expect(page.locator("#player .play")).to_have_class("play on")
    page.locator("#player song-wave").click()  # in its middle
    expect(time).to_have_text(re.compile(r"0:[23]\d / 1:00"))
    sound = [url for url in asked if "/audio/" in url]
    assert sound[0].endswith("/0/live")
    assert not sound[-1].endswith("/live")


def test_a_song_that_is_heard_and_cancelled_falls_silent(page: Any) -> None:
    length(page, "180")
    wish(page, "cancelled while it is heard")
    song = card(page, "cancelled while it is heard")
    song.get_by_role("button", name="Listen to").click()
    expect(page.locator("#player")).to_be_visible()
    song.get_by_role("button", name="Cancel", exact=True).click()
    expect(song).to_have_attribute("data-state", "cancelled", timeout=WAIT_MS)
    expect(page.locator("#player")).to_be_hidden()
    expect(page.locator("#toasts")).to_contain_text("not finished: cancelled")


@pytest.fixture(scope="module")
def source(server: Server) -> str:
    """Id of a song of ten seconds to work on."""
    song = {"prompt": "material", "duration": 10, "steps": 4, "formats": ["mp3"]}
    answer = httpx.post(f"{server.url}/v1/music", json=song, headers={**HEADERS, "Prefer": "wait=50"}, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def song(server: Server, page: Any, source: str) -> Any:
    """The page, with that song opened."""
    page.goto(f"{server.url}/#/song/{source}")
    page.get_by_role("button", name="Replace parts").wait_for()
    return page


def drag(page: Any, start: float, end: float) -> None:
    """Across the song's waveform, in shares of its width."""
    box = page.locator(".hear song-wave").bounding_box()
    page.mouse.move(box["x"] + box["width"] * start, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, box["y"] + 20)
    page.mouse.up()


def newest(server: Server) -> dict[str, Any]:
    job: dict[str, Any] = httpx.get(f"{server.url}/v1/jobs", params={"limit": 1}, headers=HEADERS).json()["jobs"][0]
    return job


def opened(page: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Open a song in the list once it is made."""
    song = page.locator(f'article.song[data-id="{job["id"]}"]')
    expect(song).to_have_attribute("data-state", "succeeded", timeout=WAIT_MS)
    song.locator("a.title").click()
    page.wait_for_url(f"**/#/song/{job['id']}")
    return job


def test_several_parts_are_replaced_at_once(server: Server, song: Any, source: str) -> None:
    song.get_by_role("button", name="Replace parts").click()
    drag(song, 0.1, 0.2)
    drag(song, 0.5, 0.6)
    drag(song, 0.55, 0.75)  # joins the one before
    parts = song.get_by_role("list", name="Parts").get_by_role("listitem")
    expect(parts).to_have_count(2)
    parts.first.get_by_label("What shall be there").fill("a bell rings")
    song.get_by_role("button", name="Make it").click()
    expect(song.get_by_label("Describe the song")).to_be_visible()
    job = opened(song, newest(server))
    expect(song.locator("p.lineage")).to_contain_text("Parts replaced of material: 0:0")
    expect(song.locator("p.lineage a")).to_have_attribute("href", f"#/song/{source}")
    assert [parent["job"] for parent in job["lineage"]["parents"]] == [source]
    first, second = job["lineage"]["regions"]
    assert (first["start"], first["end"]) == (pytest.approx(1, abs=0.1), pytest.approx(2, abs=0.1))
    assert (second["start"], second["end"]) == (pytest.approx(5, abs=0.1), pytest.approx(7.5, abs=0.1))
    assert [region.get("prompt") for region in job["request"]["regions"]] == ["a bell rings", None]


VERBS: dict[str, tuple[str, dict[str, str], str, str | None]] = {
    "extend": ("Extend", {"Seconds after": "5"}, "An extension", "repaint"),
    "vary": ("Vary a little", {"How much": "0.2"}, "A variation", None),
    "cover": ("Cover", {"In which style": "as a tango"}, "A cover", "cover"),
    "layer": ("Add a layer", {"What it plays": "a walking bass"}, "A layer added", "lego"),
    "stem": ("Take a stem out", {}, "A stem", "extract"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_every_verb_makes_knows_where_it_comes_from(server: Server, song: Any, verb: str) -> None:
    button, fields, done, task = VERBS[verb]
    song.get_by_role("button", name=button, exact=True).click()
    for label, value in fields.items():
        song.get_by_label(label).fill(value)
    song.get_by_role("button", name="Make it").click()
    expect(song.get_by_label("Describe the song")).to_be_visible()
    job = opened(song, newest(server))
    assert (job["lineage"]["verb"], job["request"].get("task")) == (verb, task)
    expect(song.locator("p.lineage")).to_contain_text(f"{done} of material")


def test_what_is_wrong_with_an_edit_stands_beside_its_field(song: Any) -> None:
    song.get_by_role("button", name="Replace parts").click()
    song.get_by_role("button", name="Make it").click()
    expect(song.locator("form.edit p.error")).to_contain_text("at least one part")
    song.get_by_role("button", name="Vary a little").click()
    song.get_by_label("How much").fill("7")
    song.get_by_role("button", name="Make it").click()
    expect(song.locator("form.edit [data-field=strength] em.wrong")).to_contain_text("1")
    song.get_by_role("button", name="Never mind").click()
    expect(song.locator("form.edit")).to_be_hidden()


def test_an_own_song_is_a_source_without_an_upload_and_said_to_be_gone(server: Server, song: Any, source: str) -> None:
    sent = []
    song.on("request", lambda request: sent.append(request.url))
    song.get_by_role("button", name="Use as source").click()
    wish(song, "after another one")
    made(song, "after another one").locator("a.title").click()
    expect(song.locator("p.lineage")).to_contain_text("A cover of material")
    assert not any("/v1/files" in url for url in sent)
    httpx.delete(f"{server.url}/v1/jobs/{source}", params={"purge": True}, headers=HEADERS).raise_for_status()
    song.reload()
    expect(song.locator("p.lineage")).to_contain_text("A cover of a song that is gone")


def test_a_server_that_stops_and_starts_again_loses_nothing(server: Server, page: Any) -> None:
    length(page, "600", versions=4)
    wish(page, "outlives a restart")
    expect(card(page, "outlives a restart")).to_have_attribute("data-state", "running", timeout=WAIT_MS)
    server.interrupt()
    expect(page.locator("#banner")).to_be_visible(timeout=WAIT_MS)
    server.start()
    expect(page.locator("#banner")).to_be_hidden(timeout=WAIT_MS)
    expect(card(page, "outlives a restart")).to_have_attribute("data-state", "running", timeout=WAIT_MS)
    card(page, "outlives a restart").get_by_role("button", name="Cancel", exact=True).click()
    expect(card(page, "outlives a restart")).to_have_attribute("data-state", "cancelled", timeout=WAIT_MS)
