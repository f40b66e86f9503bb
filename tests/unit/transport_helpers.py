"""An open transport, for tests that send single requests to a server of their own."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from workpool import Settings
from workpool.wire.http.transport import Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiohttp

TOKEN = "-".join(("pat", "hunter2", "hunter2"))


@asynccontextmanager
async def connected_transport(
    url: str, session: aiohttp.ClientSession | None = None, **values: Any
) -> AsyncIterator[Transport]:
    """Open a transport to `url` with the settings `values`; the default token is `TOKEN`."""
    if "token_file" not in values:
        values.setdefault("token", TOKEN)
    transport = Transport(Settings(base_url=url, environment_id="env_1", **values), session)
    await transport.open("me")
    try:
        yield transport
    finally:
        await transport.close()
