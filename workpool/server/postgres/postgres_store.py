"""A PostgreSQL database as the store of a control plane."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from workpool.logs import hide_token
from workpool.server.api_errors import ServeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool.server.engine import ControlPlaneEngine


def _read_password_from_url(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:
        return None  # a malformed URL: the engine's `open` raises a `ServeError` for it


class PostgresStore:
    """A database that any number of control planes share.

    Args:
        url: `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`. It is hidden from all logs.
        history: Whether each change of an item is recorded in the table `history`, which nothing
            ever shortens: for tests.
    """

    def __init__(self, url: str, *, history: bool = False) -> None:
        hide_token(url)
        password = _read_password_from_url(url)
        if password is not None:
            hide_token(password)
            hide_token(unquote(password))
        self._url = url
        self._history = history

    def make_engine(self, **options: Any) -> ControlPlaneEngine:
        """Return an engine on this database; `options`: further arguments of `PostgresEngine`.

        Raises:
            ServeError: The driver is not installed.
        """
        with _require_driver():
            from workpool.server.postgres.postgres_engine import (  # noqa: PLC0415 - an extra
                PostgresEngine,
            )
        return PostgresEngine(self._url, has_history=self._history, **options)

    async def migrate(self) -> int:
        """Upgrade the schema of the database; return the number of migrations that ran.

        Raises:
            ServeError: The driver is not installed, the database cannot be reached, or its schema
                is too new for this release.
        """
        with _require_driver():
            from workpool.server.postgres.migrations import migrate  # noqa: PLC0415 - an extra
        return await migrate(self._url)


@contextmanager
def _require_driver() -> Iterator[None]:
    """Return a context that raises a `ServeError` if its block fails to import the driver."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise ServeError(
            "a PostgreSQL store needs the extra `postgres`: pip install 'workpool[postgres]'"
        ) from None
