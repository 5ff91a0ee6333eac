"""Audio URLs that work without a key, for a while: `?expires=...&signature=...` over the path, so they fit one file only."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from urllib.parse import urlencode

from deployments.ingress.errors import Forbidden


class Signer:
    """Signs paths and checks them.

    Args:
        secret: Shared by all routers.
        lifetime_s: How long a signature holds.
    """

    def __init__(self, secret: bytes, lifetime_s: float) -> None:
        self._secret = secret
        self.lifetime_s = lifetime_s

    def sign(self, path: str) -> str:
        """`path` with its expiry and signature as query parameters."""
        # Whole minutes, so that views of the same job within one differ less and can be cached.
        expires = (int(time.time() + self.lifetime_s) // 60 + 1) * 60
        return f"{path}?{urlencode({'expires': expires, 'signature': self._mac(path, expires)})}"

    def check(self, path: str, expires: str | None, signature: str | None) -> None:
        """Accept a signed path.

        Raises:
            Forbidden: forged, for another path, or expired.
        """
        if expires is None or signature is None or not expires.isascii() or not expires.isdigit() or len(expires) > 12:
            raise Forbidden("the URL's signature is incomplete")
        if not hmac.compare_digest(self._mac(path, int(expires)).encode(), signature.encode("utf-8", "replace")):
            raise Forbidden("the URL's signature does not fit")
        if time.time() > int(expires):
            raise Forbidden("the URL has expired; ask for the job again to get a new one")

    def _mac(self, path: str, expires: int) -> str:
        digest = hmac.new(self._secret, f"{path}\n{expires}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
