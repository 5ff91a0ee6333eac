"""A small reference client of the HTTP API: submit, follow, fetch, cancel."""

from __future__ import annotations

import ipaddress
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from acestep.errors import AceStepError, InvalidRequest, Unavailable, error_from_dict

DEFAULT_URL = "http://127.0.0.1:8000"
# What is answered in the stead of a router that is being replaced: by Serve's proxy (404 before it knows the routes, 500 where the replica
# died with the request, 503) and by balancers (502 to 504).
NO_ROUTER = (404, 500, 502, 503, 504)
AGAIN_S = 1.0


def server_url(asked: str | None = None) -> str:
    """`asked`, else `ACESTEP_URL`, else the address of a server on this machine.

    Raises:
        InvalidRequest: it is no HTTP address; the message names where it comes from.
    """
    url = (asked or os.environ.get("ACESTEP_URL", "").strip() or DEFAULT_URL).rstrip("/")
    try:
        parsed = httpx.URL(url)
        bad = parsed.scheme not in ("http", "https") or not parsed.host or not 0 <= (parsed.port or 80) <= 65_535
    except httpx.InvalidURL:
        bad = True
    if bad:
        field = "url" if asked else "ACESTEP_URL"
        raise InvalidRequest(f"{field}: {url!r} is no address such as {DEFAULT_URL}", field=field, asked=url)
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Client:
    """Talks to one server.

    Args:
        url: Base address; default `ACESTEP_URL`, else a server on this machine.
        api_key: Sent as a bearer token; default `ACESTEP_API_KEY`.
        timeout_s: For one answer.
        patience_s: A request is sent again for so long where no router answers it, or one that says when to come again: jobs outlive a
            restart. A server that never answered is not waited for.
    """

    def __init__(
        self, url: str | None = None, api_key: str | None = None, timeout_s: float = 30.0, patience_s: float = 60.0
    ) -> None:
        self.url = server_url(url)
        self.patience_s = patience_s
        self._answered = False
        # The server's variable may hold several keys; any of them will do.
        key = api_key if api_key is not None else os.environ.get("ACESTEP_API_KEY", "").partition(",")[0].strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # A proxy that the shell names is not meant for this machine, and could not reach it.
            own = _is_loopback(httpx.URL(self.url).host)
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=not own)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise InvalidRequest(
                f"the proxy that ALL_PROXY, HTTP_PROXY or HTTPS_PROXY names cannot be used ({error}); unset it, or list the server's host in "
                "NO_PROXY",
                field="proxy",
            ) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, request: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/music. Returns the job."""
        # The same key each time it is sent, so that it is one job even if the answer was lost.
        return self._json("POST", "/v1/music", json=request, headers={"Idempotency-Key": str(uuid.uuid4())})

    def job(self, job_id: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._json("DELETE", f"/v1/jobs/{job_id}")

    def upload(self, path: Path) -> str:
        """POST /v1/files. Returns the id that `src_audio` and `reference_audio` take."""
        with path.open("rb") as file:
            return str(self._json("POST", "/v1/files", files={"file": (path.name, file)})["id"])

    def loras(self) -> dict[str, Any]:
        """GET /v1/loras: adapters that a request may name."""
        return self._json("GET", "/v1/loras")

    def cluster(self) -> dict[str, Any]:
        """GET /v1/cluster: pools, replicas, load."""
        return self._json("GET", "/v1/cluster")

    def wait(
        self, job_id: str, on_change: Callable[[dict[str, Any]], None] | None = None, poll_s: float = 0.3
    ) -> dict[str, Any]:
        """Poll until the job has ended. Raises its error where it did not succeed."""
        while True:
            job = self.job(job_id)
            if on_change:
                on_change(job)
            if job["state"] == "succeeded":
                return job
            if job["state"] in ("failed", "cancelled"):
                raise error_from_dict(job["error"] or {"type": "internal", "message": f"the job {job['state']}"})
            time.sleep(poll_s)

    def listen(self, job_id: str, **asked: bool) -> dict[str, Any]:
        """POST /v1/jobs/{id}/lyrics. Returns the job that listens."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self._json("POST", f"/v1/jobs/{job_id}/lyrics", json=asked, headers=headers)

    def file(self, url: str) -> bytes:
        """The bytes behind a URL of a job's audio or of what lies beside it."""
        # A path in an answer is one of the server's host, with the path that the server lies under in front.
        response = self._request("GET", str(httpx.URL(self.url).join(url)))
        return response.content

    def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        data: dict[str, Any] = self._request(method, path, **kwargs).json()
        return data

    def _request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        until = time.monotonic() + self.patience_s
        while True:
            try:
                return self._sent(method, path, **kwargs)
            except Unavailable as error:
                pause = error.details.get("retry_after")
                if pause is None or time.monotonic() + pause > until:
                    raise
            time.sleep(pause)

    def _sent(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.TransportError as error:
            raise Unavailable(
                f"no server answers at {self.url} ({type(error).__name__}). Start one with `make run` or `acestep serve`, name another with --url "
                "or ACESTEP_URL, or use --local.",
                url=self.url,
                **({"retry_after": AGAIN_S} if self._answered else {}),
            ) from error
        self._answered = True
        if response.is_error:
            raise problem_error(response)
        return response


def problem_error(response: httpx.Response) -> AceStepError:
    """The error that an answer tells; with `retry_after` in seconds where it makes sense to ask again.

    Every error of the service has a body of its own; one without comes from a proxy that finds none.
    """
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or "type" not in body:
        again = {"retry_after": AGAIN_S} if response.status_code in NO_ROUTER else {}
        return Unavailable(f"no router answers behind {response.request.url}: HTTP {response.status_code}", **again)
    kind = str(body["type"]).removeprefix("urn:acestep:")
    after = response.headers.get("retry-after", "")
    again = {"retry_after": float(after)} if after.isdecimal() else {}
    return error_from_dict(
        {"type": kind, "message": str(body.get("detail") or f"HTTP {response.status_code}"), **again}
    )
