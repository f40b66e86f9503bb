"""A process that embeds a pool ends even if a thread of the pool hangs."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workpool.server import ControlPlane

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

EMBEDDER = """
import asyncio, socket, sys, threading, time, urllib.request
from workpool import Settings, Supervisor, handler

base_url, token, environment_id, hangs = sys.argv[1:]
hung = threading.Event()

def hang(*_, **__):
    hung.set()
    time.sleep(600)

class Hung:
    collect = hang

@handler
async def work(session): ...

async def main():
    settings = Settings(base_url=base_url, token=token, environment_id=environment_id,
                        metrics_listen="127.0.0.1:0", drain_timeout=0)
    async with Supervisor(settings, plugins=[work]) as pool:
        if hangs == "collector":
            pool.registry.register(Hung())
            scrape = lambda: urllib.request.urlopen(pool.metrics_url + "/metrics")
            threading.Thread(target=scrape, daemon=True).start()
        while not hung.is_set():
            await asyncio.sleep(0.01)
    print("closed", flush=True)

if hangs == "lookup":
    socket.getaddrinfo = hang
asyncio.run(main())
"""


@pytest.mark.parametrize("hangs", ["collector", "lookup"])
async def test_process_with_embedded_pool_ends_although_a_thread_of_the_pool_hangs(
    control_plane: ControlPlane, hangs: str
) -> None:
    base_url = control_plane.base_url.replace("127.0.0.1", "localhost")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-c", EMBEDDER),
        *(base_url, control_plane.token, control_plane.environments[0], hangs),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (output, process.returncode) == (b"closed\n", 0)
