"""The tokens that requests are authenticated with, and the permissions of each.

Stores only hashes of the tokens for environments. The items' tokens are signed, so none is stored.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from hashlib import sha256
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import orjson

from workpool.server.api_errors import APIError, ServeError
from workpool.wire.protocol import ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from workpool.server.http.server_dialects import ServerDialect
    from workpool.server.stored_item import Item

Grants: TypeAlias = "Mapping[str, frozenset[str] | None]"
"""Token → the environments that it is limited to; None: all."""

_ITEM_PREFIX: Final = "item."
"""The prefix of an item's token; the environment, the item and the signature follow."""
_ID: Final = re.compile(ID_PATTERN)
_TOKEN: Final = re.compile(r"[!-~]{1,1024}")


class Caller(NamedTuple):
    """The permissions of the sender of a request.

    Attributes:
        environments: The environments that the caller may use; None: all.
        item: Environment and id of the item whose token was sent. The token allows access only to
            this item and its session. None: the caller sent no item's token.
        worker: Whether a worker's key was sent, which allows only the calls of a worker.
    """

    environments: frozenset[str] | None
    item: tuple[str, str] | None = None
    worker: bool = False

    def check_environment_access(self, environment_id: str) -> None:
        """Raise a 403 if the caller may not use this environment."""
        if self.environments is not None and environment_id not in self.environments:
            raise APIError(403, "this token is not allowed on this environment")

    def check_not_worker_key(self) -> None:
        """Raise a 403 if the caller has sent a worker's key."""
        if self.worker:
            raise APIError(403, "a worker's key may only poll, ack, heartbeat, stop and list")

    def check_item_access(self, work_id: str | None) -> None:
        """Raise a 403 if the caller sent the token of an item other than `work_id`."""
        if self.item is not None and work_id != self.item[1]:
            raise APIError(403, "an item's token is for this item and its session only")


class AcceptedTokens:
    """The accepted tokens. They are looked up by hash, so that timing reveals nothing about them.

    Args:
        grants: Token → the environments that the token may use (None: all).
        signing_key: The key that signs the tokens of items.
        worker_keys: Further tokens, for all environments: workers' keys.
    """

    def __init__(self, grants: Grants, signing_key: bytes, worker_keys: Iterable[str] = ()) -> None:
        self._grants = {_compute_token_digest(token): limits for token, limits in grants.items()}
        self._worker_keys = frozenset(map(_compute_token_digest, worker_keys))
        self._signing_key = signing_key

    def authenticate(self, headers: Mapping[str, str], dialect: ServerDialect) -> Caller:
        """Return the permissions of the token in `headers`; raises a 401 for an unknown token."""
        token = _find_token_in_headers(headers, dialect.api_key_header)
        digest = _compute_token_digest(token)
        if digest in self._grants:
            return Caller(self._grants[digest])
        if digest in self._worker_keys:
            return Caller(None, worker=True)
        if dialect.item_secrets and token.startswith(_ITEM_PREFIX) and token.isascii():
            subject, _, _ = token.rpartition(".")
            if hmac.compare_digest(token, self._sign_token_subject(subject)):
                environment_id, work_id = subject.removeprefix(_ITEM_PREFIX).split(".")
                return Caller(frozenset({environment_id}), (environment_id, work_id))
        raise APIError(401, "the token is missing or wrong")

    def make_item_secret(self, item: Item) -> str:
        """Return the secret of an item: base64url of a JSON object with the item's token."""
        token = self._sign_token_subject(f"{_ITEM_PREFIX}{item.environment_id}.{item.id}")
        return urlsafe_b64encode(orjson.dumps({"sessions_token": token})).decode().rstrip("=")

    def _sign_token_subject(self, subject: str) -> str:
        return f"{subject}.{hmac.new(self._signing_key, subject.encode(), sha256).hexdigest()}"


def _find_token_in_headers(headers: Mapping[str, str], api_key_header: str | None) -> str:
    authorization = headers.get("Authorization")
    if authorization is None and api_key_header is not None:
        return headers.get(api_key_header, "")
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _compute_token_digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def check_token(token: str) -> str:
    """Return the token if an HTTP header can contain it.

    Raises:
        ServeError: No HTTP header can contain the token. The error's text does not show the token.
    """
    if not _TOKEN.fullmatch(token):
        raise ServeError("a token must be 1 to 1024 printable ASCII characters without spaces")
    return token


def parse_token_file(text: str) -> dict[str, frozenset[str] | None]:
    """Parse a file in which each line has a token and the environments that the token may use.

    Empty lines and lines that begin with `#` are skipped.

    Raises:
        ServeError: A line is wrong. Names the line and not its content.
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
