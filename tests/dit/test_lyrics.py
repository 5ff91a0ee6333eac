"""Alignment of lyrics by dynamic time warping: against known numbers, against the plain recurrence, and where lines and words begin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from acestep.audio.tags import lrc
from acestep.dit import lyrics
from acestep.dit.attention_maps import AttentionMaps, Listener
from acestep.song import TimedLine

Floats = npt.NDArray[np.floating[Any]]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    if not (folder := os.environ.get("GOLDEN_DIR")):
        pytest.skip("GOLDEN_DIR is not set")
    found: dict[str, Any] = json.loads((Path(folder) / "lyrics.json").read_text())
    return found


def test_known_attention_gives_the_known_map_path_times_and_score(golden: dict[str, Any]) -> None:
    attention = torch.tensor(golden["attention"])
    maps = AttentionMaps(Listener({0: tuple(range(len(attention)))}, 0, attention.shape[1]), attention.shape[2], 0)
    for head in attention:
        maps.add(head)
    alignment, energy = maps.result().numpy()
    assert np.abs(alignment - np.array(golden["align_matrix"])).max() < 2e-5
    assert [list(step) for step in lyrics.warp(-alignment)] == golden["path"]
    times = lyrics.token_times(alignment, golden["seconds"])
    assert np.allclose(times, golden["token_times"], rtol=0, atol=1e-9)
    assert lrc(lyrics.sentences(golden["token_text"], times)) == golden["lrc"]
    assert [int(word) for word in lyrics.sung(golden["token_text"])] == golden["type_mask"]
    assert lyrics.aligned(energy, lyrics.sung(golden["token_text"])).score == golden["lyrics_score"]


def plain_warp(cost: Floats) -> list[tuple[int, int]]:
    """The recurrence as it is written, cell by cell."""
    tokens, frames = cost.shape
    total = np.full((tokens + 1, frames + 1), np.inf, np.float32)
    total[0, 0] = 0
    ways = {}
    for i in range(1, tokens + 1):
        for j in range(1, frames + 1):
            both, down, right = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            way = (1, 1) if both < down and both < right else (1, 0) if down < both and down < right else (0, 1)
            total[i, j] = cost[i - 1, j - 1] + total[i - way[0], j - way[1]]
            ways[i, j] = way
    path, at = [], (tokens, frames)
    while min(at) > 0:
        path.append((at[0] - 1, at[1] - 1))
        at = (at[0] - ways[at][0], at[1] - ways[at][1])
    return path[::-1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (7, 12), (12, 7), (30, 41)])
def test_the_path_is_that_of_the_recurrence_ties_included(shape: tuple[int, int]) -> None:
    for seed in range(5):
        cost = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)  # many ties
        assert list(lyrics.warp(cost)) == plain_warp(cost)


def test_lines_words_and_scripts_without_blanks() -> None:
    texts = ["[", "Verse", "]", "\n", "Hello", " wor", "ld", "\n", "\n", "世", "界", " ok", "\n", "end"]
    found = lyrics.sentences(texts, [(i, i + 0.5) for i in range(len(texts))])
    assert [(s.text, s.start, s.end) for s in found] == [
        ("[Verse]", 0, 3.5), ("Hello world", 4, 7.5), ("世界 ok", 9, 12.5), ("end", 13, 13.5)
    ]  # fmt: skip
    assert [(w.text, w.start, w.end) for w in found[1].words] == [("Hello", 4, 4.5), ("world", 5, 6.5)]
    assert [w.text for w in found[2].words] == ["世", "界", "ok"]
    assert lrc(found).splitlines()[2] == "[00:09.00]世界 ok"
    assert lrc([TimedLine(text="late", start=125.239, end=130.0)]) == "[02:05.24]late"
    assert lrc([TimedLine(text="late", start=59.999, end=60.0)]) == "[01:00.00]late"


def test_nothing_heard_scores_nothing() -> None:
    silent = lyrics.aligned(np.zeros((4, 9)), [True] * 4)
    assert (silent.coverage, silent.confidence, silent.score) == (0, 0, 0)
    assert lyrics.aligned(np.zeros((2, 9)), [False] * 2).coverage == 1
