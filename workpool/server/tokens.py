"""The tokens that may call, and their environments. Holds hashes, never a token."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING, Final, TypeAlias

from workpool.server.errors import Refusal, ServeError
from workpool.wire.protocol import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Mapping

Grants: TypeAlias = "Mapping[str, frozenset[str] | None]"
"""Token → the environments that it is limited to; None: all."""

_ID: Final = re.compile(ID_PATTERN)
_TOKEN: Final = re.compile(r"[!-~]{1,1024}")


class Tokens:
    """The tokens that are accepted, looked up by hash: comparing takes no telling time."""

    def __init__(self, grants: Grants) -> None:
        self._grants = {_digest(token): limits for token, limits in grants.items()}

    def admit(
        self, headers: Mapping[str, str], api_key_header: str | None = None
    ) -> frozenset[str] | None:
        """Return the environments that a request's token is limited to; 401 when unknown.

        `api_key_header`: the header that may hold the token in place of `Authorization`.
        """
        digest = _digest(_token_of(headers, api_key_header))
        if digest not in self._grants:
            raise Refusal(401, "the token is missing or wrong")
        return self._grants[digest]


def _token_of(headers: Mapping[str, str], api_key_header: str | None) -> str:
    authorization = headers.get("Authorization")
    if authorization is None and api_key_header is not None:
        return headers.get(api_key_header, "")
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def check_token(token: str) -> str:
    """Return a token that can be sent in a header; raises `ServeError`, without the token."""
    if not _TOKEN.fullmatch(token):
        raise ServeError("a token must be 1 to 1024 printable ASCII characters without spaces")
    return token


def parse_token_file(text: str) -> dict[str, frozenset[str] | None]:
    """Read a token a line, then the environments that it is limited to.

    Empty lines and lines that begin with `#` are skipped.

    Raises:
        ServeError: Names the line, never its content.
    """
    grants: dict[str, frozenset[str] | None] = {}
    for line, content in enumerate(text.splitlines(), start=1):
        token, *environments = content.split() or ["#"]
        if token.startswith("#"):
            continue
        try:
            check_token(token)
        except ServeError as error:
            raise ServeError(f"token file, line {line}: {error}") from None
        if token in grants:
            raise ServeError(f"token file, line {line}: the token of an earlier line")
        if not all(_ID.fullmatch(name) for name in environments):
            raise ServeError(f"token file, line {line}: not an environment id")
        grants[token] = frozenset(environments) or None
    if not grants:
        raise ServeError("token file: no token in it")
    return grants
