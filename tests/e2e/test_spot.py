"""A node that is told that it will be taken away: it gets no new song, ends those that it can, and the others are made elsewhere."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import pytest

from acestep.cli.client import Client
from deployments.config.build import PoolSize, config_of
from tests.cluster import Cluster
from tests.e2e.test_fleet import pool, until

pytestmark = pytest.mark.e2e
ARGS = {"engine": "simulated", "profile": "rtx-3060-ti-8", "model": "acestep-v15-turbo"}
SONG = {"prompt": "a song", "thinking": False, "use_cot_metas": False}
SHORT, LONG = {**SONG, "duration": 120}, {**SONG, "duration": 240, "steps": 20}  # 8 s and 37 s on such a card


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    nodes = [("stays", "tier4", 8.0), ("goes", "tier4", 8.0)]
    with Cluster(nodes, config_of([PoolSize("dit-tier4", "dit", "tier4", 2, 2, ARGS)])) as started:
        both_serve(started)
        yield started


def both_serve(cluster: Cluster) -> None:
    until(cluster, lambda c: pool(c, "dit-tier4")["replicas"]["running"] == 2)


def jobs(cluster: Cluster) -> dict[str, tuple[str, str | None]]:
    """State of each job, and the replica that works on it, as the job store has it: hundreds of questions would keep a router busy."""
    with contextlib.closing(sqlite3.connect(f"file:{cluster.home}/jobs.sqlite3?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT id, state, places FROM jobs").fetchall()
    found = {}
    for job, state, places in rows:
        at = [place[0] for place in json.loads(places or "[]") if place[1]] if state == "running" else []
        found[job] = (state, at[-1] if at else None)
    return found


def working(cluster: Cluster) -> dict[str, str]:
    """Which replica works on which job."""
    return {job: replica for job, (_, replica) in jobs(cluster).items() if replica}


def until_working(cluster: Cluster, songs: list[dict[str, Any]]) -> dict[str, str]:
    end = time.monotonic() + 120
    while not {song["id"] for song in songs} <= (seen := working(cluster)).keys():
        assert time.monotonic() < end, f"{seen}\n{cluster.output()[-3000:]}"
        time.sleep(0.1)
    return seen


def until_done(cluster: Cluster, songs: list[dict[str, Any]]) -> list[set[str]]:
    """The replicas that worked on each job."""
    seen: dict[str, set[str]] = {song["id"]: set() for song in songs}
    end = time.monotonic() + 240
    while {(now := jobs(cluster))[job][0] for job in seen} != {"succeeded"}:
        assert time.monotonic() < end, f"{now} {seen}\n{cluster.output()[-3000:]}"
        for job in seen:
            if replica := now[job][1]:
                seen[job].add(replica)
        time.sleep(0.2)
    return list(seen.values())


def test_a_node_with_notice_ends_what_it_can_gets_nothing_new_and_loses_nothing(cluster: Cluster) -> None:
    with Client(cluster.url) as client:
        before = [client.submit(SHORT) for _ in range(2)]
        first = until_working(cluster, before)
        assert len(set(first.values())) == 2
        cluster.tell("drain goes 60")
        until(cluster, lambda c: pool(c, "dit-tier4")["replicas"]["running"] == 1)
        after = [client.submit(SHORT) for _ in range(3)]
        seen = until_done(cluster, [*before, *after])
        assert all(replicas <= {first[job["id"]]} for job, replicas in zip(before, seen, strict=False)), (
            "it ended there"
        )
        stays = seen[-1]
        assert len(stays) == 1
        assert seen[2:] == [stays] * 3, "the node with notice gets none"

        cluster.tell("remove goes")
        cluster.tell("add goes")
        both_serve(cluster)
        songs = [client.submit(LONG) for _ in range(2)]
        first = until_working(cluster, songs)
        assert len(set(first.values())) == 2
        cluster.tell("drain goes 5")
        until(cluster, lambda c: pool(c, "dit-tier4")["replicas"]["running"] == 1)
        time.sleep(5)  # its notice: neither can end by then
        cluster.tell("remove goes")
        rest = [replicas | {first[job["id"]]} for job, replicas in zip(songs, until_done(cluster, songs), strict=True)]
        assert sorted(map(len, rest)) == [1, 2], "one began anew"
        assert set.intersection(*rest) == stays, "on the node that stayed"
