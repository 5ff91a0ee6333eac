"""Audio files over HTTP: parts of them, and the signatures of their URLs."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest

from .clients import submit
from .conftest import Build, Site


@pytest.fixture(params=["folder", "object store"])
def with_files(request: pytest.FixtureRequest, build: Build) -> Site:
    """A site over either kind of file store."""
    return build(**({} if request.param == "folder" else {"files_url": request.getfixturevalue("s3")}))


async def test_parts_of_a_file(with_files: Site) -> None:
    site = with_files
    job = await submit(site)
    site.succeed(str(job["id"]), b"0123456789")
    url = (await site.client.get(f"/v1/jobs/{job['id']}")).json()["result"]["items"][0]["audio"][0]["url"]
    whole = await site.client.get(url)
    etag, written = whole.headers["etag"], whole.headers["last-modified"]
    for asked, condition, status, body in [
        (None, None, 200, b"0123456789"), ("bytes=2-4", None, 206, b"234"), ("bytes=7-", None, 206, b"789"),
        ("bytes=-3", None, 206, b"789"), ("Bytes = 5-99", None, 206, b"56789"), ("bytes=0-1,4-5", None, 200, b"0123456789"),
        ("bytes=10-", None, 416, None), ("bytes=-0", None, 416, None), ("bytes=4-2", None, 416, None),
        ("lines=1-2", None, 200, b"0123456789"), ("bytes=-", None, 200, b"0123456789"), ("bytes=٣-", None, 200, b"0123456789"),
        ("bytes=2-4", etag, 206, b"234"), ("bytes=2-4", written, 206, b"234"), ("bytes=2-4", '"other"', 200, b"0123456789"),
    ]:  # fmt: skip
        sent = {"Range": asked, "If-Range": condition}
        got = await site.client.get(url, headers={k: v.encode() for k, v in sent.items() if v is not None})
        assert got.status_code == status, asked
        if body is not None:
            assert got.content == body, asked
        else:
            assert got.headers["content-range"] == "bytes */10"
            assert got.json()["type"] == "urn:acestep:invalid_request"
    long_ago, bad = "Sun, 06 Nov 1994 08:49:37 GMT", "yesterday"
    for status, conditions in [
        *((304, {"If-None-Match": known}) for known in (etag, f'"x", W/{etag}', "*")),
        (304, {"If-Modified-Since": written}), (200, {"If-Modified-Since": long_ago}), (200, {"If-Modified-Since": bad}),
        (200, {"If-None-Match": '"other"', "If-Modified-Since": written}),  # the tag goes first
        (412, {"If-Match": '"stale"'}), (412, {"If-Match": f"W/{etag}"}), (412, {"If-Match": '"stale"', "If-None-Match": etag}),
        (200, {"If-Match": f'"x", {etag}'}), (200, {"If-Match": "*"}), (304, {"If-Match": etag, "If-None-Match": etag}),
        (412, {"If-Unmodified-Since": long_ago}), (200, {"If-Unmodified-Since": written}),
        (200, {"If-Match": etag, "If-Unmodified-Since": long_ago}), (200, {"If-Unmodified-Since": bad}),
        (206, {"Range": "bytes=0-3", "If-Range": etag}), (200, {"Range": "bytes=0-3", "If-Range": f"W/{etag}"}),
        (200, {"Range": "bytes=0-3", "If-Range": long_ago}), (304, {"Range": "bytes=0-3", "If-Modified-Since": written}),
        (412, {"Range": "bytes=0-3", "If-Match": '"stale"'}),
    ]:  # fmt: skip
        for method in ("GET", "HEAD"):
            got = await site.client.request(method, url, headers=conditions)
            assert got.status_code == status, conditions
            assert got.headers["etag"] == etag
            if status == 304:
                assert not got.content
    assert (await site.client.get(url, headers={"If-None-Match": '"x"'})).status_code == 200
    head = await site.client.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "10", b"")
    site.service.storage.delete(f"songs/{job['id']}")
    assert (await site.client.get(url)).status_code == 404


async def test_signed_urls_cannot_be_forged_or_used_elsewhere(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACESTEP_API_KEY", "secret")
    site = build()
    key = {"Authorization": "Bearer secret"}
    one, two = [(await submit(site, **key))["id"] for _ in range(2)]
    for job_id in (one, two):
        site.succeed(str(job_id))
    url = (await site.client.get(f"/v1/jobs/{one}", headers=key)).json()["result"]["items"][0]["audio"][0]["url"]
    path, query = url.split("?")
    assert (await site.client.get(url)).status_code == 200  # without any key
    expires = dict(p.split("=") for p in query.split("&"))["expires"]
    forged = [
        f"/v1/jobs/{two}/audio/0.wav?{query}",
        f"/v1/jobs/{one}/audio/1.wav?{query}",
        f"/v1/jobs/{one}/audio/0.mp3?{query}",
        f"{path}?{query}x",
        f"{path}?{query.replace(expires, str(int(expires) + 60))}",
        f"{path}?expires={expires}",
        f"{path}?{query.split('&')[1]}",
        f"{path}?expires=٣&signature=x",
    ]
    for target in forged:
        answer = await site.client.get(target)
        assert answer.status_code == 403, target
        assert answer.json()["type"] == "urn:acestep:forbidden"
    assert (await site.client.get(path)).status_code == 401
    assert (await site.client.get(path, headers=key)).status_code == 200
    late = build(url_lifetime_s=1e-9)
    monkeypatch.setattr("deployments.ingress.signing.time.time", lambda: 1e9)
    old = late.service.signer.sign(path)
    monkeypatch.undo()
    assert (await site.client.get(old)).status_code == 403


async def test_a_long_file_is_one_request_of_a_key(build: Build) -> None:
    """It goes out in pieces, so that nothing holds all of it for one who reads slowly."""
    key = {"name": "me", "sha256": sha256(b"me").hexdigest(), "requests_per_minute": 6}
    site, headers = build(api_keys=[key]), {"Authorization": "Bearer me"}
    data = random.Random(1).randbytes(4_000_003)
    asked = {"prompt": "x", "duration": 20, "seed": 1}
    job = (await site.client.post("/v1/music", json=asked, headers=headers)).json()
    site.succeed(job["id"], data)
    url = f"/v1/jobs/{job['id']}/audio/0.wav"
    for path in (url, f"/v1/audio?path=songs/{job['id']}/0-wav.wav"):
        whole = await site.client.get(path, headers=headers)
        assert (whole.status_code, whole.content, whole.headers["accept-ranges"]) == (200, data, "bytes")
        for said, first, end in (("1000-", 1_000, 4_000_003), ("5-2600000", 5, 2_600_001)):
            part = await site.client.get(path, headers={**headers, "Range": f"bytes={said}"})
            if part.status_code == 429:  # the seventh
                assert (path, said) == (f"/v1/audio?path=songs/{job['id']}/0-wav.wav", "5-2600000")
                return
            assert (part.status_code, part.content) == (206, data[first:end])
            assert part.headers["content-range"] == f"bytes {first}-{end - 1}/4000003"
            assert part.headers["etag"] == whole.headers["etag"]
    raise AssertionError("its requests are not counted")
