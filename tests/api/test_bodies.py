"""What is read of a body, for whom, and what of it is parsed; what one key may keep, hold open and ask."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.datastructures import UploadFile

from deployments.ingress import bodies
from deployments.ingress import source_audio as sources
from deployments.ingress.bodies import KEYLESS_BYTES, MAX_VALUES
from deployments.jobs.blobs import Storage

from .conftest import Build, Site
from .test_limits import key

SONG = {"prompt": "quiet piano", "duration": 20}
JSON = {"Content-Type": "application/json"}
NATIVE = ("/v1/music", "/v1/plans", "/v1/inspire", "/v1/format", "/v1/understand", "/v1/files", "/v1/webhooks/x/retry")
COMPAT = ("/release_task", "/query_result", "/v1/cancel", "/format_input", "/v1/create_sample", "/create_random_sample")
CHAT = "/v1/chat/completions"


class Sent:
    """A body that tells how much of it was taken."""

    def __init__(self, data: bytes, piece: int = 16_384) -> None:
        self.data, self.piece, self.taken = data, piece, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.data), self.piece):
            part = self.data[start : start + self.piece]
            self.taken += len(part)
            yield part


@pytest.fixture
def guarded(build: Build) -> Site:
    return build(api_keys=[key("right")])


async def post(site: Site, path: str, body: Sent, **headers: str) -> Any:
    """In pieces as a server gets them: httpx would hand the application the whole body at once."""
    from deployments.ingress.app import build_app

    answer: dict[str, Any] = {"body": b""}
    parts = aiter(body)

    async def receive() -> dict[str, Any]:
        try:
            return {"type": "http.request", "body": await anext(parts), "more_body": True}
        except StopAsyncIteration:
            return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        answer.update(status=message["status"]) if "status" in message else None
        answer["body"] += message.get("body", b"")

    named = {"host": "127.0.0.1", "content-type": "application/json", **headers}
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 5),
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }  # fmt: skip
    await build_app(site.service)(scope, receive, send)
    return answer


@pytest.mark.parametrize("path", [*NATIVE, *COMPAT, CHAT])
@pytest.mark.parametrize("header", ["", "Bearer wrong"])
async def test_without_a_key_next_to_nothing_of_a_body_is_read(guarded: Site, path: str, header: str) -> None:
    body = Sent(b'{"a":[' + b"[]," * 200_000 + b"[]]}")
    answer = await post(guarded, path, body, **({"authorization": header} if header else {}))
    assert answer["status"] == 401, answer
    assert body.taken <= (KEYLESS_BYTES + body.piece if path in COMPAT else 0)
    if path in COMPAT:
        assert b"in the header" in answer["body"]


async def test_a_small_body_may_hold_its_key_and_a_large_one_is_told_where_to_put_it(guarded: Site, wav: bytes) -> None:
    small = {**SONG, "audio_duration": 20, "lyrics": "l\u00e4" * 4_000, "ai_token": "right"}
    assert (await guarded.client.post("/release_task", json=small)).status_code == 200
    form = {"prompt": "x", "ai_token": "right"}
    audio = {"src_audio": ("a.wav", wav * 4)}
    refused = await guarded.client.post("/release_task", data=form, files=audio)
    assert (refused.status_code, "in the header" in refused.json()["detail"]) == (401, True)
    taken = await guarded.client.post("/release_task", data=form, files=audio, headers={"Authorization": "right"})
    assert taken.status_code == 200, taken.text


async def test_who_is_beyond_its_rate_is_refused_before_its_body(build: Build) -> None:
    site = build(api_keys=[key("slow", requests_per_minute=1)])
    assert (await site.client.get("/v1/jobs", headers={"Authorization": "slow"})).status_code == 200
    for path in (*NATIVE, *COMPAT, CHAT):
        body = Sent(b'{"a": 1}' + b" " * 500_000)
        assert (await post(site, path, body, authorization="slow"))["status"] == 429
        assert body.taken == 0, path


@pytest.mark.parametrize("path", [*NATIVE, *COMPAT])
async def test_what_no_file_comes_with_is_small(site: Site, path: str) -> None:
    for kind in (
        "application/json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
    ):
        files = path in ("/v1/files", "/release_task") and kind.startswith("multipart")
        body = Sent(b"x" * (3 << 20))
        answer = await post(site, path, body, **{"content-type": kind})
        assert 400 <= answer["status"] < 500, (kind, answer)
        if not files and path != "/v1/webhooks/x/retry":  # which reads none
            assert body.taken <= (1 << 20) + body.piece, kind


@pytest.mark.parametrize("path", [*NATIVE[:5], *COMPAT, CHAT])
@pytest.mark.parametrize("body", [b"[" * 900_000, b'{"a":' * 180_000, b"[" * 400_000 + b"]" * 400_000,
                                  b"[" + b"[]," * 300_000 + b"[]]", b'{"a":[' + b"1," * 400_000 + b"1]}"])  # fmt: skip
async def test_brackets_are_refused_unparsed(
    site: Site, path: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, loads = [], json.loads

    def counted(text: Any, **options: Any) -> Any:
        parsed.append(len(text))
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", counted)
    answer = await site.client.post(path, content=body, headers=JSON)
    monkeypatch.undo()
    assert answer.status_code in (400, 413), answer.text[:200]
    assert "nested" in answer.text or str(MAX_VALUES) in answer.text or path in (*COMPAT, CHAT)
    assert max(parsed, default=0) < 10_000  # chat reads its own refusal
    assert len(answer.content) < 1_000


async def test_the_largest_honest_bodies_are_taken(site: Site) -> None:
    plan = {"metadata": {"duration": 600.0}, "codes": [list(range(3_000))] * 8}
    body = {**SONG, "duration": 600, "batch_size": 8, "plan": plan, "lyrics": "[a], " * 1_600}
    answer = await site.client.post("/v1/music", json=body)
    assert answer.status_code == 202, answer.text[:300]
    codes = "".join(f"<|audio_code_{n}|>" for n in range(60_000, 63_000))
    for sent in ({"json": {"prompt": "x", "audio_code_string": codes}}, {"data": {"prompt": "x", "audio_code_string": codes}},
                 {"data": {"prompt": "x", "audio_code_string": codes}, "files": {"none": b""}}):  # fmt: skip
        answer = await site.client.post("/release_task", **sent)
        assert answer.status_code == 200, answer.text[:300]


async def test_forms_have_few_fields(site: Site) -> None:
    many = "&".join(f"f{n}=1" for n in range(5_000))
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        answer = await site.client.post("/release_task", content=many, headers={"Content-Type": kind})
        assert (answer.status_code, "500" in answer.text) == (400, True), answer.text


async def test_few_uploads_are_in_memory_at_once(site: Site, wav: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty at once, on each of the three ways in; counted is what has been read from the disk and is not kept yet."""
    import base64

    held, most = 0, 0
    keep = sources.Sources._keep

    def counted(self: Any, data: bytes, *rest: Any) -> Any:
        nonlocal held, most
        held += 1
        most = max(most, held)
        try:
            return keep(self, data, *rest)
        finally:
            held -= 1

    reads, read = [], UploadFile.read

    async def watched(self: Any, size: int = -1) -> bytes:
        reads.append(size)
        most_now = len(reads) - done[0]
        assert most_now <= sources.AT_ONCE, "read before its turn"
        data = await read(self, size)
        return data

    done = [0]

    def put(self: Any, name: str, data: bytes) -> None:
        done[0] += 1
        real_put(self, name, data)

    real_put = Storage.put
    monkeypatch.setattr(sources.Sources, "_keep", counted)
    big = wav + bytes(2 << 20)
    text = base64.b64encode(big).decode()
    message = {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": text}}]}
    chat = {"messages": [message], "stream": False}
    site.service.args = site.service.args.model_copy(update={"chat_timeout_s": 0.01})
    chats = [site.client.post(CHAT, json=chat) for _ in range(10)]
    statuses = [answer.status_code for answer in await asyncio.gather(*chats)]
    assert set(statuses) == {504}, statuses
    assert most == 1
    monkeypatch.setattr(UploadFile, "read", watched)
    monkeypatch.setattr(Storage, "put", put)
    songs = [
        site.client.post(
            "/release_task", data={"prompt": "x"}, files={"ctx_audio": ("a.wav", big)}, headers={"Idempotency-Key": f"k{n}"}
        )
        for n in range(15)
    ]  # fmt: skip
    files = [site.client.post("/v1/files", files={"file": ("a.wav", big)}) for _ in range(15)]
    statuses = [answer.status_code for answer in await asyncio.gather(*songs, *files)]
    assert set(statuses) <= {200, 201}, statuses
    assert 1 <= most <= sources.AT_ONCE


async def test_a_form_s_file_has_the_same_hash_in_pieces(site: Site, wav: bytes) -> None:
    first, again = [
        await site.client.post("/release_task", data={"prompt": "x"}, files={"ctx_audio": ("a.wav", io.BytesIO(wav))},
                               headers={"Idempotency-Key": "one"}) for _ in range(2)
    ]  # fmt: skip
    assert first.json()["data"]["task_id"] == again.json()["data"]["task_id"]
    other = await site.client.post("/release_task", data={"prompt": "x"}, files={"ctx_audio": ("a.wav", wav + wav)},
                                   headers={"Idempotency-Key": "one"})  # fmt: skip
    assert (other.status_code, "another request body" in other.text) == (400, True)
    record = site.service.sources.records.get((await site.client.post("/v1/files", files={"file": wav})).json()["id"])
    assert record is not None
    assert record.sha256 == hashlib.sha256(wav).hexdigest()


async def test_what_a_key_keeps_has_an_end_and_room_comes_back(build: Build, wav: bytes) -> None:
    site = build(api_keys=[key("a"), key("b")], max_kept_upload_bytes=int(2.5 * len(wav)))
    mine = {"Authorization": "a"}
    sent = [site.client.post("/v1/files", files={"file": wav}, headers=mine) for _ in range(6)]
    answers = await asyncio.gather(*sent)
    assert sorted(a.status_code for a in answers) == [201, 201, 429, 429, 429, 429]
    refused = next(a for a in answers if a.status_code == 429)
    assert "delete some" in refused.json()["detail"]
    assert 86_000 < int(refused.headers["retry-after"]) <= 86_701
    assert (await site.client.post("/v1/files", files={"file": wav}, headers={"Authorization": "b"})).status_code == 201
    kept = next(a.json()["id"] for a in answers if a.status_code == 201)
    assert (await site.client.delete(f"/v1/files/{kept}", headers=mine)).status_code == 204
    assert (await site.client.post("/v1/files", files={"file": wav}, headers=mine)).status_code == 201


async def test_what_could_not_be_stored_takes_no_room(
    build: Build, wav: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = build(max_kept_upload_bytes=int(1.5 * len(wav)))

    def full(*_: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", full)
        assert (await site.client.post("/v1/files", files={"file": wav})).status_code == 500
    assert (await site.client.post("/v1/files", files={"file": wav})).status_code == 201


async def test_a_key_holds_open_so_much_and_others_are_not_touched(build: Build) -> None:
    site = build(api_keys=[key("a"), key("b")], max_waiting=5)
    mine, others = ({"Authorization": name} for name in ("a", "b"))
    ids = {
        name: (await site.client.post("/v1/music", json=SONG, headers=h)).json()["id"]
        for name, h in (("a", mine), ("b", others))
    }
    events = f"/v1/jobs/{ids['a']}/events"
    open_ones = [asyncio.create_task(site.client.get(events, headers=mine)) for _ in range(3)]
    open_ones += [
        asyncio.create_task(site.client.get(f"/v1/jobs/{ids['a']}", headers={**mine, "Prefer": "wait=30"}))
        for _ in range(2)
    ]
    async with asyncio.timeout(20):
        while site.service.waiting._open["a"] < 5:
            await asyncio.sleep(0.01)
        for request in (
            site.client.get(events, headers=mine),
            site.client.post("/v1/music", json=SONG, headers={**mine, "Prefer": "wait=9"}),
            site.client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}, headers=mine),
        ):
            refused = await request
            assert (refused.status_code, "5 event streams" in refused.text) == (429, True)
            assert int(refused.headers["retry-after"]) >= 1
        assert site.service.store.counts()["queued"] == 2, "refused before anything was written"
        assert (await site.client.get("/v1/jobs", headers=mine)).status_code == 200
        quick = await site.client.get(f"/v1/jobs/{ids['b']}", headers={**others, "Prefer": "wait=1"})
        assert quick.status_code == 200
        site.service.store.request_cancel(ids["a"])
        site.service.dispatcher.notices.tell()
        await asyncio.gather(*open_ones)
    assert not site.service.waiting._open
    assert (await site.client.get(events, headers=mine)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/inspire", {"query": "x"}), ("/v1/format", {"caption": "x"}), ("/v1/understand", {"codes": [1]}),
     ("/v1/create_sample", {"query": "x"}), ("/format_input", {"prompt": "x"})],
)  # fmt: skip
async def test_questions_count_among_a_key_s_jobs(
    build: Build, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = build(api_keys=[key("a", concurrent_jobs=2), key("b")])
    started, end = asyncio.Event(), asyncio.Event()

    async def ask(*_: Any, **__: Any) -> Any:
        started.set()
        await end.wait()
        from acestep.lm.work import Sample

        return Sample(caption="said")

    for name in ("inspire", "format", "understand"):
        monkeypatch.setattr(site.service.talk, name, ask)
    mine = {"Authorization": "a"}
    job = (await site.client.post("/v1/music", json=SONG, headers=mine)).json()["id"]
    first = asyncio.create_task(site.client.post(path, json=body, headers=mine))
    await asyncio.wait_for(started.wait(), 20)
    async with asyncio.timeout(20):
        refused = await site.client.post(path, json=body, headers=mine)
    assert (refused.status_code, "it may: 2" in refused.text) == (429, True)
    assert "retry-after" in refused.headers
    site.service.store.request_cancel(job)
    second = asyncio.create_task(site.client.post(path, json=body, headers=mine))
    end.set()
    assert [(await t).status_code for t in (first, second)] == [200, 200]
    assert not site.service._asking


async def test_questions_take_few_places_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from acestep.lm.work import Sample
    from deployments.ingress.service import MAX_QUESTIONS, QUESTIONS_AT_ONCE

    asked, most, end = 0, 0, asyncio.Event()

    async def ask(**_: Any) -> Sample:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await end.wait()
        asked -= 1
        return Sample(caption="said")

    monkeypatch.setattr(site.service.talk, "inspire", ask)
    loops = [
        asyncio.create_task(site.client.post("/v1/inspire", json={"query": "x"})) for _ in range(MAX_QUESTIONS + 8)
    ]
    async with asyncio.timeout(20):
        while sum(task.done() for task in loops) < 8:
            await asyncio.sleep(0.01)
        assert asked == QUESTIONS_AT_ONCE
        assert {task.result().status_code for task in loops if task.done()} == {429}
        end.set()
        statuses = [(await task).status_code for task in loops]
    assert (statuses.count(200), most) == (MAX_QUESTIONS, QUESTIONS_AT_ONCE)


def test_depth_is_bounded() -> None:
    deep = b'{"a":' * (bodies.MAX_DEPTH + 1) + b"1" + b"}" * (bodies.MAX_DEPTH + 1)
    with pytest.raises(ValueError, match="nested"):
        bodies.parse_json(deep)
    assert bodies.parse_json(b'\xef\xbb\xbf{"a": [[[1]]]}') == {"a": [[[1]]]}
