"""The control plane `open-managed-agents`, installed from PyPI in its own virtual environment.

It needs Python 3.12, stores everything in one SQLite file, and requires no key.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PACKAGE = "open-managed-agents==0.1.0"
PYTHONS = ("3.12", "3.13")
INSTALL_SECONDS = 240
START_SECONDS = 60
HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "managed-agents-2026-04-01",
}
SERVER = """
import asyncio, sys
import uvicorn
from app.db.engine import get_engine
from app.db.models import Base
from app.main import app

async def create_tables():
    async with get_engine().begin() as connection:
        await connection.run_sync(Base.metadata.create_all)

asyncio.run(create_tables())
uvicorn.run(app, fd=int(sys.argv[1]), log_level="warning")
"""


class InstallationError(Exception):
    """Raised if the control plane cannot be installed; the message is the reason."""


def find_python_interpreter() -> str:
    """Return the path of a Python that can run the control plane.

    Raises:
        InstallationError: None of the versions is installed.
    """
    if sys.version_info >= (3, 12):
        return sys.executable
    for version in PYTHONS:
        # The pyenv shim `python3.12` fails unless pyenv has selected that version.
        for variables in ({}, {"PYENV_VERSION": run_and_return_output("pyenv", "latest", version)}):
            code = "import sys; print(sys.executable)"
            path = run_and_return_output(f"python{version}", "-c", code, **variables)
            if path:
                return path
    raise InstallationError(f"none of Python {', '.join(PYTHONS)} is installed")


def run_and_return_output(*command: str, **variables: str) -> str:
    """Return the output of a command; empty if the command fails or does not exist."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(  # noqa: S603 - our own words
            command, text=True, stderr=subprocess.DEVNULL, env=os.environ | variables
        ).strip()
    return ""


def install_control_plane(folder: Path) -> str:
    """Install the control plane into a virtual environment; return the path of its Python.

    Raises:
        InstallationError: There is no suitable Python, or the package cannot be installed.
    """
    python = str(folder / "bin" / "python")
    for command in (
        [find_python_interpreter(), "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", PACKAGE],
    ):
        try:
            done = subprocess.run(  # noqa: S603 - our own words
                command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise InstallationError(
                f"{PACKAGE} was not installed within {INSTALL_SECONDS} s"
            ) from None
        if done.returncode:
            problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InstallationError(f"{PACKAGE} cannot be installed: {problem}")
    return python


@dataclass(frozen=True)
class OpenManagedAgentsServer:
    """A running control plane with one self-hosted environment and one agent."""

    http: aiohttp.ClientSession
    base_url: str
    environment_id: str
    agent_id: str

    async def create_session(self) -> str:
        """Create a session with one message, which queues one item. Return the session's id."""
        body = {"agent": self.agent_id, "environment_id": self.environment_id}
        session_id: str = (await post_json(self.http, f"{self.base_url}/sessions", body))["id"]
        message = {"type": "user.message", "content": [{"type": "text", "text": "hello"}]}
        url = f"{self.base_url}/sessions/{session_id}/events"
        await post_json(self.http, url, {"events": [message]})
        return session_id


async def post_json(http: aiohttp.ClientSession, url: str, body: object) -> dict[str, Any]:
    """Send a request with a JSON body, which must succeed, and return the JSON answer."""
    async with http.post(url, json=body) as response:
        assert response.status in {200, 201}, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


@asynccontextmanager
async def running_control_plane(
    python: str, folder: Path
) -> AsyncIterator[OpenManagedAgentsServer]:
    """Run the control plane on a free port of the loopback interface, with an empty queue."""
    database = f"sqlite+aiosqlite:///{folder / 'open_managed_agents.db'}"
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        process = await asyncio.create_subprocess_exec(
            *(python, "-c", SERVER, str(listening.fileno())),
            env=os.environ | {"DATABASE_URL": database},
            cwd=folder,
            pass_fds=[listening.fileno()],
        )
        base_url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    try:
        timeout = aiohttp.ClientTimeout(total=START_SECONDS)
        async with aiohttp.ClientSession(headers=HEADERS, timeout=timeout) as http:
            # The socket already listens, so the first request waits until the server has started.
            environment = {"name": "tests", "config": {"type": "self_hosted"}}
            agent = {"name": "tests", "model": "none"}
            yield OpenManagedAgentsServer(
                http,
                base_url,
                (await post_json(http, f"{base_url}/environments", environment))["id"],
                (await post_json(http, f"{base_url}/agents", agent))["id"],
            )
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
