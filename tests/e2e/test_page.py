"""The page in a real browser, against the real server: what a person does with it, and what goes wrong for them.

Skipped without Debian's `chromium` (`CHROMIUM` names another) and playwright.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from acestep.song import TINY_NOTICE
from tests.e2e.browser import WAIT_MS, card, length, made, wish
from tests.server import ROOT, Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
pytestmark = [pytest.mark.e2e, pytest.mark.browser]
EVIL = '"><img src=x onerror="window.broken=1"><script>window.broken=1</script>\u202etxt.exe javascript:window.broken=1'


def test_a_song_from_the_first_visit_with_nothing_but_typing_and_enter(server: Server, visit: Any) -> None:
    page = visit(server.url)
    page.keyboard.type("a slow waltz about rain")
    page.keyboard.press("Enter")
    song = made(page, "a slow waltz about rain")
    song.get_by_role("button", name="Play").click()
    expect(page.locator("#player")).to_be_visible()
    expect(page.locator("#player .time")).to_have_text(re.compile(r"0:0[1-9] /"))
    heard = page.evaluate(
        """async () => {
            const link = document.querySelector('#player .title').hash.split('/').pop();
            const job = await (await fetch('v1/jobs/' + link)).json();
            const file = await (await fetch(job.result.items[0].audio[0].url)).arrayBuffer();
            const audio = await new OfflineAudioContext(2, 1, 48000).decodeAudioData(file);
            const loudest = audio.getChannelData(0).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
            const peaks = await (await fetch('v1/jobs/' + link + '/files/0.peaks')).json();
            return [audio.duration, loudest, job.result.items[0].duration, peaks.levels[1].max.length];
        }"""
    )
    assert heard[0] == pytest.approx(heard[2], abs=0.1)
    assert heard[1] > 0.01
    assert heard[3] == 2048
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press(" ")
    expect(page.locator("#player").get_by_role("button", name="Play")).to_be_visible()


def test_the_notice_and_every_warning_stand_at_the_song(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "10")
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("Guidance Scale").fill("3")
    wish(page, "warned about guidance")
    made(page, "warned about guidance").locator("a.title").click()
    expect(page.locator("p.notice")).to_have_text(TINY_NOTICE)
    expect(page.get_by_role("list", name="What was changed")).to_contain_text("guidance_scale")


def test_what_is_wrong_is_said_beside_its_field(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "5")
    wish(page, "too short")
    wrong = page.locator("[data-field=duration] em.wrong")
    expect(wrong).to_contain_text("10")
    expect(page.get_by_label("Length", exact=True)).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Length", exact=True).fill("10")
    wish(page, "long enough")
    made(page, "long enough")
    expect(wrong).to_be_hidden()


def test_cancel_reload_and_two_tabs(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "180", versions=8)
    wish(page, "to be cancelled")
    song = card(page, "to be cancelled")
    song.get_by_role("button", name="Cancel", exact=True).wait_for()
    page.reload()
    other = page.context.new_page()
    other.goto(server.url)
    expect(card(other, "to be cancelled")).to_have_attribute("data-state", "running", timeout=WAIT_MS)
    card(page, "to be cancelled").get_by_role("button", name="Cancel", exact=True).click()
    for tab in (page, other):
        expect(card(tab, "to be cancelled")).to_have_attribute("data-state", "cancelled", timeout=WAIT_MS)
    expect(card(page, "to be cancelled").get_by_role("button", name="Try again")).to_be_visible()


def test_a_clamp_is_shown(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "10", versions=2)  # more than this machine's tier takes at once
    wish(page, "one instead of two")
    made(page, "one instead of two").locator("a.title").click()
    expect(page.get_by_role("list", name="What was changed")).to_contain_text("batch_size: 2 became 1")


def test_a_plan_is_changed_before_it_is_rendered(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "10")
    page.get_by_label("Describe the song").fill("planned first")
    page.get_by_role("button", name="Plan first").click()
    page.get_by_role("heading", name="The plan").wait_for()
    page.locator("[data-plan=bpm]").fill("77")
    page.get_by_role("button", name="Make a song").click()
    song = page.locator("article.song[data-state=succeeded]", has_text="77 bpm").first
    expect(song).to_be_visible(timeout=WAIT_MS)


def test_write_it_out_fills_the_form(server: Server, visit: Any) -> None:
    page = visit(server.url)
    page.get_by_label("Describe the song").fill("a song for a long drive home")
    page.get_by_role("button", name="Write it out").click()
    expect(page.get_by_label("Tempo", exact=True)).not_to_have_value("", timeout=WAIT_MS)
    expect(page.get_by_label("Describe the song")).not_to_have_value("a song for a long drive home")


def test_lyrics_follow_the_song_where_it_was_asked_for(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "20")
    page.get_by_label("Lyrics", exact=True).fill("[Verse]\nLights go by along the shore\n[Chorus]\nDrive with me")
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("Timestamps", exact=True).select_option("true")
    wish(page, "sung in time")
    made(page, "sung in time").locator("a.title").click()
    lines = page.locator("button.line")
    expect(lines).to_have_count(4)
    lines.nth(1).click()
    expect(page.locator("#player .time")).to_have_text(re.compile(r"\d:\d\d / 0:20"))


def test_a_song_is_deleted_with_its_audio(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "10")
    wish(page, "to be deleted")
    made(page, "to be deleted").locator("a.title").click()
    address = page.url.rpartition("/")[2]
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete song").click()
    expect(page.get_by_label("Describe the song")).to_be_visible()
    expect(page.locator("article.song", has_text="to be deleted")).to_have_count(0)
    assert httpx.get(f"{server.url}/v1/jobs/{address}").status_code == 404


def test_text_stays_text(server: Server, visit: Any) -> None:
    page = visit(server.url)
    length(page, "10")
    page.get_by_label("Lyrics", exact=True).fill(f"[Verse]\n{EVIL}")
    wish(page, f"{EVIL} as a wish")
    made(page, "onerror").locator("a.title").click()
    page.get_by_text("Everything the server says").click()
    expect(page.locator("pre.lyrics")).to_contain_text("onerror")
    assert page.evaluate("window.broken") is None
    assert page.locator("main img, main script, main iframe").count() == 0


def test_the_fleet_is_shown_with_its_settings(server: Server, visit: Any) -> None:
    song = {"prompt": "for the fleet's last hour", "duration": 10}
    httpx.post(f"{server.url}/v1/music", json=song, headers={"Prefer": "wait=60"}, timeout=90).raise_for_status()
    page = visit(f"{server.url}/#/fleet")
    expect(page.get_by_text("both stages can serve")).to_be_visible()
    expect(page.locator("article.pool")).to_have_count(2)
    page.get_by_text("Settings and limits").first.click()
    expect(page.locator("article.pool table").first).to_contain_text("float32")
    page.wait_for_timeout(2500)  # the next look at the fleet
    expect(page.locator("article.pool details").first).to_have_attribute("open", "")
    expect(page.get_by_role("img", name="Jobs that ended")).to_have_accessible_name(re.compile(r"[1-9]\d* made"))
    links = page.get_by_role("link", name="metrics", exact=True)
    assert "ray_" in httpx.get(str(links.first.get_attribute("href"))).text
    dashboard = str(page.get_by_role("link", name="Dashboard").get_attribute("href"))
    assert httpx.get(dashboard, headers=server.ray_headers).status_code == 200


def answering(status: int, headers: dict[str, str], body: str) -> Callable[[Any], None]:
    return lambda route: route.fulfill(status=status, headers=headers, body=body)


def test_trouble_of_every_kind_is_told_and_passes(server: Server, visit: Any) -> None:
    page = visit(server.url)
    answers = {
        "a limit": (429, {"Retry-After": "2"}, '{"detail": "too many songs of this key"}', "too many songs of this key"),
        "a fault": (500, {}, '{"detail": "an unexpected error; quote incident 0123"}', "quote incident 0123"),
        "a malformed answer": (200, {}, "<html>not JSON</html>", "could not be read"),
    }  # fmt: skip
    for name, (status, headers, body, said) in answers.items():
        page.route("**/v1/music", answering(status, headers, body))
        wish(page, name)
        expect(page.locator("form.make p.error")).to_contain_text(said)
        page.unroute("**/v1/music")
        expect(page.get_by_role("button", name="Make a song")).to_be_enabled()
    page.context.set_offline(True)
    wish(page, "said into the void")
    expect(page.locator("#banner")).to_be_visible()
    page.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden(timeout=WAIT_MS)
    made(page, "said into the void")  # once: the submit was sent again under its key
    expect(page.locator("article.song", has_text="said into the void")).to_have_count(1)


def test_the_page_is_small_and_sent_once(server: Server) -> None:
    page = httpx.get(server.url, headers={"Accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    assert "unsafe" not in page.headers["content-security-policy"]
    names = [file.name for file in (ROOT / "deployments/ingress/studio/static").iterdir() if file.name != "index.html"]
    assert {"app.js", "style.css", "icon.svg"} <= set(names)
    files = [page, *(httpx.get(f"{server.url}/studio/{name}") for name in sorted(names))]
    assert sum(len(f.content) for f in files) < 150_000
    for file in files:
        assert file.status_code == 200
        again = httpx.get(str(file.url), headers={"Accept": "text/html", "If-None-Match": file.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert files[1].headers["content-encoding"] == "gzip"
    assert httpx.get(f"{server.url}/studio/..%2Froutes.py").status_code == 404
    plain = httpx.get(server.url).json()
    assert plain["links"]["documentation"] == "/docs"
