"""Starts a real Prometheus that listens on the loopback interface."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import aiohttp
import orjson

from tests.reserved_port import reserve_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

CONFIG: Final = """
global: {{scrape_interval: {seconds}s, evaluation_interval: {seconds}s, scrape_timeout: {seconds}s}}
rule_files: {rules}
scrape_configs:
  - job_name: workpool
    static_configs: [{{targets: {targets}}}]
"""


@asynccontextmanager
async def run_prometheus(
    program: str, folder: Path, ports: Sequence[int], *, seconds: int, rules: Sequence[Path] = ()
) -> AsyncIterator[str]:
    """Run Prometheus with its data and its log in `folder`, and return its URL once it is ready."""
    config = CONFIG.format(
        seconds=seconds,
        rules=orjson.dumps([str(path) for path in rules]).decode(),
        targets=orjson.dumps([f"127.0.0.1:{port}" for port in ports]).decode(),
    )
    (folder / "prometheus.yml").write_text(config)
    with reserve_port() as port:
        with (folder / "prometheus.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                stdout=log,
                stderr=log,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            await _wait_until_ready(url)
            yield url
        finally:
            process.terminate()
            await process.wait()


async def _wait_until_ready(url: str) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.get(f"{url}/-/ready") as answer:
                    if answer.ok:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.2)
