"""Program that runs a control plane on SQLite, for tests that kill it.

Usage: `sqlite_control_plane.py FILE`.
"""

from __future__ import annotations

import asyncio
import sys

from workpool.server import ControlPlane, SqliteStore

ENV, TOKEN = "env_0199aaaaaaaa70008000000000000001", "token-of-everything"


async def serve_until_killed(path: str) -> None:
    plane = ControlPlane(environments=(ENV,), tokens={TOKEN: None}, store=SqliteStore(path))
    async with plane:
        print(plane.port, flush=True)  # noqa: T201 - the parent process waits for it
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve_until_killed(sys.argv[1]))
