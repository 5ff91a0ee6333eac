"""ACE-Step's own API: audio that goes in and comes out, and the paths that stay closed."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from acestep.audio.latent_file import holds_latents, read_latent_facts
from acestep.source_fields import SongName

from .clients import poll, release
from .conftest import Build, Site, fleet_view


async def test_audio_urls_are_relative_encoded_and_served(site: Site) -> None:
    task_id = (await release(site, {"prompt": "x", "audio_format": "opus", "batch_size": 1}))["task_id"]
    site.succeed(task_id, b"0123456789")
    url = json.loads((await poll(site, task_id))[0]["result"])[0]["file"]
    assert url.startswith("/v1/audio?path=%2F")
    assert Path(parse_qs(urlsplit(url).query)["path"][0]).read_bytes() == b"0123456789"  # a client on this machine
    got = await site.client.get(url)
    assert (got.content, got.headers["content-type"]) == (b"0123456789", "audio/ogg")
    assert (await site.client.get(url, headers={"Range": "bytes=2-3"})).content == b"23"
    head = await site.client.head(f"/api{url}")
    assert (head.status_code, head.headers["content-length"], head.headers["accept-ranges"]) == (200, "10", "bytes")


async def test_beyond_loopback_urls_hold_no_path_of_the_server(build: Build) -> None:
    site = build(view=fleet_view(http_host="0.0.0.0"))
    task_id = (await release(site, {"prompt": "x", "batch_size": 1}))["task_id"]
    site.succeed(task_id)
    item = (await poll(site, task_id))[0]
    assert str(site.service.storage.url) not in item["result"]
    assert (await site.client.get(json.loads(item["result"])[0]["file"])).status_code == 200


async def test_nothing_but_songs_is_served(site: Site, tmp_path: Path) -> None:
    task_id = (await release(site, {"prompt": "x", "batch_size": 1}))["task_id"]
    site.succeed(task_id)
    songs = Path(site.service.storage.url) / "songs"
    (tmp_path / "secret.wav").write_bytes(b"secret")
    (songs / task_id / "link.wav").symlink_to(tmp_path / "secret.wav")
    site.service.storage.put(f"songs/{task_id}/0-manifest.json", b"{}")
    outside = [
        "/etc/passwd", "../../jobs.sqlite3", str(tmp_path / "secret.wav"), f"{songs}/../../secret.wav", "songs/../uploads/x.wav",
        f"songs/{task_id}/link.wav", f"{songs}/{task_id}/link.wav", "", ".", "songs", f"songs/{task_id}", "\0", "songs/a/b/c.wav",
    ]  # fmt: skip
    for path in outside:
        answer = await site.client.get("/v1/audio", params={"path": path})
        assert (answer.status_code, answer.json()) == (
            403,
            {"detail": "Access denied: path outside allowed directory"},
        ), path
    for path in (f"songs/{task_id}/9-mp3.mp3", f"songs/{uuid.uuid4()}/0-mp3.mp3", f"songs/{task_id}/0-manifest.json"):
        answer = await site.client.get("/v1/audio", params={"path": path})
        assert (answer.status_code, answer.json()) == (404, {"detail": "Audio file not found"}), path
    missing = await site.client.get("/v1/audio")
    assert missing.status_code == 422
    assert missing.json()["detail"][0]["loc"] == ["query", "path"]


async def test_source_audio_by_upload_by_url_and_by_path(site: Site, wav: bytes, tmp_path: Path) -> None:
    fields = {"prompt": "x", "task_type": "cover", "batch_size": "1"}
    uploaded = await release(site, data=fields, files={"ctx_audio": ("../../evil.wav", wav), "ref_audio": ("", b"")})
    request = site.job(uploaded["task_id"]).request
    assert request.src_audio.startswith("uploads/file-")  # type: ignore[union-attr]
    assert request.reference_audio == ()
    assert site.service.storage.read(request.src_audio) == wav  # type: ignore[arg-type]
    # A song of ours, as the URL that a result carries and as the path inside it.
    site.succeed(uploaded["task_id"], wav)
    url = json.loads((await poll(site, uploaded["task_id"]))[0]["result"])[0]["file"]
    path = parse_qs(urlsplit(url).query)["path"][0]
    folder = tmp_path  # beside the file store, inside the temporary folder
    (folder / "mine.wav").write_bytes(wav)
    (folder / "link.wav").symlink_to("/etc/passwd")
    song = SongName(job=uploaded["task_id"])
    for source, of in (
        (url, song),
        (f"http://server{url}", song),
        (path, song),
        (f"songs/{uploaded['task_id']}/0-mp3.mp3", song),
        (str(folder / "mine.wav"), None),
    ):
        body = {"prompt": "x", "task_type": "cover", "src_audio_path": source, "reference_audio_path": source}
        taken = site.job((await release(site, body))["task_id"]).request
        kept = site.service.storage.read(taken.src_audio)  # type: ignore[arg-type]
        # A song brings what it was decoded from. (Where bytes differ, to show how takes longer than a test may.)
        same = holds_latents(kept) and read_latent_facts(kept, "").song == of if of else kept == wav
        assert same, (source, taken.src_audio)
        assert len(taken.reference_audio) == 1
    refused = await site.client.post("/release_task", json={"prompt": "x", "src_audio_path": str(folder / "link.wav")})
    assert refused.json() == {"detail": "absolute audio file paths are not allowed"}


async def test_beyond_loopback_the_temporary_folder_is_closed(build: Build, wav: bytes, tmp_path: Path) -> None:
    file = tmp_path / "shared" / "mine.wav"
    file.parent.mkdir()
    file.write_bytes(wav)
    body = {"prompt": "x", "task_type": "cover", "src_audio_path": str(file)}
    outside = build(view=fleet_view(http_host="0.0.0.0"))
    assert (await outside.client.post("/release_task", json=body)).status_code == 400
    opened = build(view=fleet_view(http_host="0.0.0.0"), audio_roots=[str(file.parent)])
    task_id = (await release(opened, {**body, "batch_size": 1}))["task_id"]
    opened.succeed(task_id, wav)
    url = json.loads((await poll(opened, task_id))[0]["result"])[0]["file"]
    await release(opened, {**body, "src_audio_path": url})  # its own songs are always a source
    upload = {"data": {"prompt": "x", "task_type": "cover"}, "files": {"src_audio": ("a.wav", wav)}}
    assert (await outside.client.post("/release_task", **upload)).status_code == 200


async def test_uploads_are_limited(build: Build, wav: bytes) -> None:
    site = build(max_upload_bytes=2048, max_body_bytes=1024)
    big = await site.client.post("/release_task", data={"prompt": "x"}, files={"src_audio": ("a.wav", wav)})
    assert big.status_code == 413
    assert (await site.client.post("/release_task", json={"prompt": "x" * 2000})).status_code == 413
