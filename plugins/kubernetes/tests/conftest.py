"""Fixtures: a Kubernetes API server for one pod, with TLS and tokens."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from workpool_kubernetes import Kubernetes
from workpool_kubernetes.plugin import DELETION_COST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NAMESPACE, POD = "workers", "workpool-6d5f9c-x7k2p"
WAIT_SECONDS = 50.0
"""The time limit of a wait, which a loaded machine does not exceed."""
KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256"


@pytest.fixture(autouse=True)
def _increase_wait_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow more time for events of the pool, which come late on a loaded machine."""
    monkeypatch.setattr("workpool.testing.kit.WAIT_SECONDS", WAIT_SECONDS)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with two CAs, and a server certificate that the first CA signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("certificates")
    # Python 3.13 and later accept only certificates with these extensions.
    usage = "-addext keyUsage=critical,keyCertSign"
    (path / "server.ext").write_text("authorityKeyIdentifier=keyid\nsubjectAltName=IP:127.0.0.1")
    for command in (
        f"req -x509 {KEY} {usage} -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem",
        f"req -x509 {KEY} {usage} -nodes -days 2 -subj /CN=other -keyout other.key -out other.pem",
        f"req {KEY} -nodes -subj /CN=server -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
        " -extfile server.ext -out server.pem",
    ):
        subprocess.run(  # noqa: S603 - no input from outside
            [openssl, *command.split()], cwd=path, check=True, capture_output=True
        )
    return path


def apply_merge_patch(target: Any, patch: Any) -> Any:
    """Return a JSON value after a merge patch, as RFC 7396 defines it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = apply_merge_patch(result.get(name), value)
    return result


class PodAPIServer:
    """A Kubernetes API server that has one pod.

    Attributes:
        token: The only token that is accepted.
        failures: The statuses of the next answers; 0 means no answer at all.
        pod: The stored pod.
        costs: The deletion costs that were written, oldest first.
        answers: The statuses of all answers.
        service_account: The directory with token, CA and namespace, as a pod has it.
    """

    def __init__(self, service_account: Path) -> None:
        self.token = "first.token-1"  # noqa: S105 - of the test
        self.failures: list[int] = []
        self.pod: dict[str, Any] = {"metadata": {"name": POD, "annotations": {"kept": "yes"}}}
        self.costs: asyncio.Queue[str] = asyncio.Queue()
        self.answers: list[int] = []
        self.service_account = service_account
        self.port = 0

    def make_plugin(self, **settings: Any) -> Kubernetes:
        """Return the plugin of a worker that runs in the pod."""
        return Kubernetes(service_account=self.service_account, **{"interval": 1.0} | settings)

    def rotate_token(self) -> None:
        """Make the fake API server accept only a new token, and replace the file of the token.

        The kubelet replaces the file in the same way.
        """
        self.token += "-rotated"
        new = self.service_account / "token.new"
        new.write_text(f"{self.token}\n")
        new.replace(self.service_account / "token")

    async def wait_for_deletion_cost(self, cost: str) -> None:
        """Wait until the plugin writes this deletion cost."""
        async with asyncio.timeout(WAIT_SECONDS):
            while await self.costs.get() != cost:
                pass

    async def handle_request(self, request: web.Request) -> web.Response:
        status = self._choose_answer_status(request)
        if status == 0:
            # Never answer. The server cancels this handler when the client disconnects.
            await asyncio.Event().wait()
        self.answers.append(status)
        if status != 200:
            headers = {"Location": "/elsewhere"} if status == 302 else {}
            message = f'pods "{POD}": refused with {status}'
            body = {"kind": "Status", "status": "Failure", "message": message, "code": status}
            return web.json_response(body, status=status, headers=headers)
        self.pod = apply_merge_patch(self.pod, json.loads(await request.text()))
        self.costs.put_nowait(self.pod["metadata"]["annotations"][DELETION_COST])
        return web.json_response(self.pod)

    def _choose_answer_status(self, request: web.Request) -> int:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return 401
        if request.path != f"/api/v1/namespaces/{NAMESPACE}/pods/{POD}":
            return 404
        if request.method != "PATCH":
            return 405
        if request.content_type != "application/merge-patch+json":
            return 415
        return self.failures.pop(0) if self.failures else 200


class LoggedWarnings(logging.Handler):
    """A logging handler that stores the plugin's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.put_nowait(record.getMessage())

    async def wait_for_warning(self) -> str:
        """Wait for a warning, and return its text."""
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.texts.get()


@pytest.fixture
async def logged_warnings() -> AsyncIterator[LoggedWarnings]:
    handler = LoggedWarnings()
    logger = logging.getLogger("workpool.kubernetes")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
async def api_server(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PodAPIServer]:
    """A running API server, and the environment variables and files of a worker in its pod."""
    server = PodAPIServer(tmp_path)
    (tmp_path / "token").write_text(f"{server.token}\n")
    (tmp_path / "namespace").write_text(NAMESPACE)
    (tmp_path / "ca.crt").write_bytes((certificates / "ca.pem").read_bytes())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle_request)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    _, server.port = runner.addresses[0][:2]
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    monkeypatch.setenv("POD_NAME", POD)
    yield server
    await runner.cleanup()
