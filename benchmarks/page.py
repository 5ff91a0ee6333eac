"""How soon the page answers a hand, with a thousand songs in the library and with a dozen, in one run. Needs chromium and playwright.

    python -m benchmarks.page [--quick] [--json] [--url URL]

Each interaction is done several times; of each the browser tells (Event Timing) how long it took to the next paint, and how long the page's
own thread computed for it, whatever else the machine did meanwhile. `--url` looks at a running server instead, with the songs that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.dit import machine
from tests.gallery import gallery

MARKS = {"paint_ms": 100, "compute_ratio": 1.5}
SONGS = {"many": 1_000, "few": 12}
LEAST_MS = 16  # what the browser tells nothing of took less
WATCH = """
window.felt = [];
new PerformanceObserver((list) => list.getEntries().forEach((e) => e.interactionId && window.felt.push(e.duration)))
    .observe({type: 'event', durationThreshold: 16});
window.blocked = [];
new PerformanceObserver((list) => list.getEntries().forEach((e) => window.blocked.push(e.duration))).observe({type: 'longtask'});
"""
PAINTED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))"
Do = Callable[[], Any]


class Hand:
    """What a person does on the page. Each returns to where it began, or the next one does."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.cards = page.locator("article.song:has(button.play:not(.live))")

    def steps(self) -> list[tuple[str, Do]]:
        page, key = self.page, self.page.keyboard.press
        play, title = self.cards.first.locator("button.play"), self.cards.nth(1).locator("a.title")
        return [
            ("put the cursor into the wish", page.get_by_label("Describe the song").click),
            ("type a letter", lambda: key("a")),
            ("play", play.click),
            ("pause", play.click),
            ("mark as a favourite", self.cards.first.get_by_role("button", name="Favourite").click),
            ("arrow down", lambda: key("ArrowDown")),
            ("open a song", title.click),
            ("open an edit", page.get_by_role("button", name="Vary a little").click),
            ("back to the songs", page.get_by_role("link", name="Songs", exact=True).first.click),
            ("show made ones only", lambda: page.get_by_label("Which songs").press("m")),
            ("show all", lambda: page.get_by_label("Which songs").press("a")),
            ("type into the search", lambda: page.get_by_label("Search songs").press("x")),
            ("empty the search", lambda: page.get_by_label("Search songs").press("Backspace")),
        ]

    def to_the_end(self, songs: int) -> None:
        """Look through the whole list, so that the page knows all of it, and come back."""
        self.page.mouse.move(900, 600)
        for _ in range(100 + songs):
            if self.page.locator("p.foot").inner_text() == "":
                break
            self.page.mouse.wheel(0, 8000)
            self.page.wait_for_timeout(50)
        self.page.evaluate("scrollTo({top: 0, behavior: 'instant'})")


def measure(chromium: Any, url: str, songs: int, times: int) -> dict[str, Any]:
    """Of every interaction: to the next paint and in the page's thread, milliseconds."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(WATCH)
    page.goto(url)
    page.locator("article.song").first.wait_for()
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def computed() -> float:
        found = devtools.send("Performance.getMetrics")["metrics"]
        return 1000 * float(next(m["value"] for m in found if m["name"] == "TaskDuration"))

    hand = Hand(page, url)
    hand.to_the_end(songs)
    paint: dict[str, list[float]] = {}
    compute: dict[str, list[float]] = {}
    for _ in range(times + 1):  # the first round is not counted: scripts are compiled, addresses looked up
        for name, do in hand.steps():
            page.evaluate(PAINTED)
            page.evaluate("window.felt.length = 0")
            before = computed()
            do()
            page.evaluate(PAINTED)
            compute.setdefault(name, []).append(computed() - before)
            paint.setdefault(name, []).append(max([LEAST_MS, *page.evaluate("window.felt")]))
    told = sorted(ms for one in paint.values() for ms in one[1:])
    found = {
        "interactions": len(told),
        "paint_ms": {"median": statistics.median(told), "p98": told[int(0.98 * (len(told) - 1))], "worst": told[-1]},
        "long_tasks": len(page.evaluate("window.blocked")),
        "each": {
            name: {"paint_ms": statistics.median(ms[1:]), "compute_ms": round(statistics.median(compute[name][1:]), 1)}
            for name, ms in paint.items()
        },
    }
    page.close()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each interaction three times instead of ten")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--url", help="a running server, instead of songs and cards that are made up")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "marks": MARKS}
    times = 3 if args.quick else 10
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        if args.url:
            report["running"] = measure(chromium, args.url, 0, times)
        else:
            for name, songs in SONGS.items():
                with tempfile.TemporaryDirectory() as home, gallery(Path(home), songs=songs) as url:
                    report[name] = {"songs": songs, **measure(chromium, url, songs, times)}
            of = {name: sum(one["compute_ms"] for one in report[name]["each"].values()) for name in SONGS}
            report["compute_ratio"] = round(of["many"] / of["few"], 2)
        chromium.close()
    print(json.dumps(report) if args.json else "\n".join(f"{name}: {value}" for name, value in report.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
