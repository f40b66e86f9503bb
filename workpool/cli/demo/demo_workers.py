"""The workers of the demo: processes of `workpool run`, with their logs.

Each process has ended once `DemoWorker.run_worker_process` returns or is cancelled.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any, Final, Literal

from workpool.wire.protocol import QODER

SLOTS: Final = 4
"""The setting `concurrency` of each worker."""
LINE_BYTES: Final = 64 * 1024
_METRICS_SERVED: Final = "metrics served"
_LOUD: Final = {"warning", "error", "critical"}

State = Literal["starting", "running", "killed", "ended"]


class DemoWorker:
    """One process of `workpool run`, whose output the demo shows.

    Args:
        name: The `worker_id`.
        plugin: The name of its plugin.
        settings: The settings as variables, since arguments must not contain the token.
        show: Called with the name of the worker and a line of its output.

    Attributes:
        pid: The process id; 0 before the start.
        url: The address of `/metrics`; empty until known.
        status: The exit status; None while it runs.
    """

    def __init__(
        self,
        name: str,
        plugin: str,
        settings: Mapping[str, str],
        show: Callable[[str, str], None],
    ) -> None:
        self.name = name
        self.state: State = "starting"
        self.url = ""
        self.pid = 0
        self.status: int | None = None
        self._plugin = plugin
        self._settings = settings
        self._show = show
        self._process: asyncio.subprocess.Process | None = None
        self._must_end = False

    async def run_worker_process(self) -> None:
        """Run the process and show its output until the process ends; a cancellation kills it."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "workpool", "run", self._plugin),
            env=self._settings,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach the demo only: the demo drains its workers.
        )
        self._process, self.pid = process, process.pid
        # `terminate` may have been called before the process existed, so send the signal now.
        if self._must_end:
            self.terminate()
        try:
            if process.stdout is not None:
                async for line in _read_lines(process.stdout):
                    self._show_output_line(line)
            self.status = await process.wait()
        finally:
            if self.state != "killed":
                self.state = "ended"
            if process.returncode is None:
                process.kill()
                await process.wait()

    def kill(self) -> None:
        """Send SIGKILL, so that the worker ends without a clean-up."""
        if self._process is not None:
            self.state = "killed"
            with suppress(ProcessLookupError):
                self._process.kill()

    def terminate(self) -> None:
        """Drain the worker: send SIGTERM, now or as soon as its process exists."""
        self._must_end = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def _show_output_line(self, line: str) -> None:
        """Show a line of output, unless it is an info line of workpool itself."""
        record: Any = None
        with suppress(ValueError):
            record = json.loads(line)
        if not isinstance(record, dict) or "logger" not in record:
            self._show(self.name, line)
            return
        logger, message = str(record["logger"]), str(record.get("message"))
        if message == _METRICS_SERVED:
            self.url = str(record.get("url"))
            self.state = "running"
            self._show(self.name, f"runs pid={self.pid} metrics={self.url}")
        ours = logger.partition(".")[0] == "workpool" and logger != "workpool.session"
        if ours and record.get("level") not in _LOUD:
            return
        self._show(self.name, message)
        if "stack" in record:
            self._show(self.name, str(record["stack"]))


def worker_settings(base_url: str, token: str, environment_id: str, name: str) -> dict[str, str]:
    """Return the environment variables of a worker of the demo."""
    settings = {
        "base_url": base_url,
        "dialect": QODER,
        "token": token,
        "environment_id": environment_id,
        "worker_id": name,
        "concurrency": str(SLOTS),
        "pollers": "2",
        "prefetch": "0",
        "reclaim_older_than_ms": "5000",
        # Use the shortest lease, so that other workers receive a killed worker's items soon.
        "lease_ttl": "10",
        "drain_timeout": "3",
        "read_rate": "0",
        "write_rate": "0",
        "metrics_listen": "127.0.0.1:0",
        "log_level": "info",
        "log_format": "json",
    }
    foreign = {"WORKPOOL_TOKEN_FILE", "WORKPOOL_PLUGINS"}
    return {
        **{name: value for name, value in os.environ.items() if name not in foreign},
        **{f"WORKPOOL_{name.upper()}": value for name, value in settings.items()},
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1"),
        "PYTHONUNBUFFERED": "1",
    }


async def _read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a stream; lines of more than `LINE_BYTES` are split."""
    rest = b""
    while chunk := await stream.read(LINE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            yield line.decode("utf-8", "replace")
    if rest:
        yield rest.decode("utf-8", "replace")
