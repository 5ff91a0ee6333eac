"""Songs as material on the page: parts replaced, more before and after, variations, covers, layers and stems; and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.browser import WAIT_MS, length, made, wish
from tests.server import Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
pytestmark = [pytest.mark.e2e, pytest.mark.browser]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Its checkpoint can do every task, as base models can."""

    def base(config: dict[str, Any]) -> None:
        next(app for app in config["applications"] if app["name"] == "dit")["args"] = {"model": "tiny-base"}

    with Server(base) as running:
        yield running


def song_to_work_on(page: Any, text: str) -> str:
    """Make a song of 20 s and open it. Returns its id."""
    length(page, "20")
    wish(page, text)
    made(page, text).locator("a.title").click()
    page.get_by_role("button", name="Replace parts").wait_for()
    return str(page.url.rpartition("/")[2])


def drag(page: Any, start: float, end: float) -> None:
    """Across the song's waveform, in shares of its width."""
    box = page.locator(".hear song-wave").bounding_box()
    page.mouse.move(box["x"] + box["width"] * start, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, box["y"] + 20)
    page.mouse.up()


def newest(server: Server) -> dict[str, Any]:
    job: dict[str, Any] = httpx.get(f"{server.url}/v1/jobs", params={"limit": 1}).json()["jobs"][0]
    return job


def opened(page: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Open a song in the list once it is made."""
    song = page.locator(f'article.song[data-id="{job["id"]}"]')
    expect(song).to_have_attribute("data-state", "succeeded", timeout=WAIT_MS)
    song.locator("a.title").click()
    page.wait_for_url(f"**/#/song/{job['id']}")
    return job


def test_several_parts_are_replaced_at_once(server: Server, visit: Any) -> None:
    page = visit(server.url)
    source = song_to_work_on(page, "to be mended")
    page.get_by_role("button", name="Replace parts").click()
    drag(page, 0.1, 0.2)
    drag(page, 0.5, 0.6)
    drag(page, 0.55, 0.75)  # joins the one before
    parts = page.get_by_role("list", name="Parts").get_by_role("listitem")
    expect(parts).to_have_count(2)
    parts.first.get_by_label("What shall be there").fill("a bell rings")
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_label("Describe the song")).to_be_visible()
    job = opened(page, newest(server))
    expect(page.locator("p.lineage")).to_contain_text("Parts replaced of to be mended: 0:0")
    expect(page.locator("p.lineage a")).to_have_attribute("href", f"#/song/{source}")
    assert [parent["job"] for parent in job["lineage"]["parents"]] == [source]
    first, second = job["lineage"]["regions"]
    assert (first["start"], first["end"]) == (pytest.approx(2, abs=0.2), pytest.approx(4, abs=0.2))
    assert (second["start"], second["end"]) == (pytest.approx(10, abs=0.2), pytest.approx(15, abs=0.2))
    assert [region.get("prompt") for region in job["request"]["regions"]] == ["a bell rings", None]


VERBS: dict[str, tuple[str, dict[str, str], str]] = {
    "extend": ("Extend", {"Seconds after": "12"}, "An extension"),
    "vary": ("Vary a little", {"How much": "0.2"}, "A variation"),
    "cover": ("Cover", {"In which style": "as a tango"}, "A cover"),
    "layer": ("Add a layer", {"What it plays": "a walking bass"}, "A layer added"),
    "stem": ("Take a stem out", {}, "A stem"),
}


def test_every_verb_makes_a_song_that_knows_where_it_comes_from(server: Server, visit: Any) -> None:
    page = visit(server.url)
    source = song_to_work_on(page, "material")
    for verb, (button, fields, done) in VERBS.items():
        page.goto(f"{server.url}/#/song/{source}")
        page.get_by_role("button", name=button, exact=True).click()
        for label, value in fields.items():
            page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Make it").click()
        expect(page.get_by_label("Describe the song")).to_be_visible()
        job = opened(page, newest(server))
        assert job["lineage"]["verb"] == verb
        expect(page.locator("p.lineage")).to_contain_text(f"{done} of material")
    assert httpx.get(f"{server.url}/v1/jobs/{job['id']}").json()["request"]["task"] == "extract"


def test_what_is_wrong_with_an_edit_stands_beside_its_field(server: Server, visit: Any) -> None:
    page = visit(server.url)
    song_to_work_on(page, "worked on in vain")
    page.get_by_role("button", name="Replace parts").click()
    page.get_by_role("button", name="Make it").click()
    expect(page.locator("form.edit p.error")).to_contain_text("at least one part")
    page.get_by_role("button", name="Vary a little").click()
    page.get_by_label("How much").fill("7")
    page.get_by_role("button", name="Make it").click()
    expect(page.locator("form.edit [data-field=strength] em.wrong")).to_contain_text("1")
    page.get_by_role("button", name="Never mind").click()
    expect(page.locator("form.edit")).to_be_hidden()


def test_a_source_that_is_gone_is_said_to_be(server: Server, visit: Any) -> None:
    page = visit(server.url)
    source = song_to_work_on(page, "soon to be gone")
    page.get_by_role("button", name="Vary a little").click()
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_label("Describe the song")).to_be_visible()
    opened(page, newest(server))
    httpx.delete(f"{server.url}/v1/jobs/{source}", params={"purge": True})
    page.reload()
    expect(page.locator("p.lineage")).to_contain_text("A variation of a song that is gone")


def test_an_own_song_is_a_source_without_an_upload(server: Server, visit: Any) -> None:
    page = visit(server.url)
    song_to_work_on(page, "named as a source")
    sent = []
    page.on("request", lambda request: sent.append(request.url))
    page.get_by_role("button", name="Use as source").click()
    wish(page, "after another one")
    made(page, "after another one").locator("a.title").click()
    expect(page.locator("p.lineage")).to_contain_text("A cover of named as a source")
    assert not any("/v1/files" in url for url in sent)
