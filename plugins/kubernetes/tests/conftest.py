"""Fixtures: an API server of Kubernetes for one pod, with TLS and tokens."""

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
SECONDS = 30.0
"""The bound of a wait, with room for a loaded machine."""
KEY = "-newkey ec -pkeyopt ec_paramgen_curve:P-256"


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with two CAs, and a server's certificate of the first."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes certificates with openssl")
    path = tmp_path_factory.mktemp("pki")
    # The certificates have the extensions that Python requires since version 3.13.
    usage = "-addext keyUsage=critical,keyCertSign"
    (path / "server.ext").write_text("authorityKeyIdentifier=keyid\nsubjectAltName=IP:127.0.0.1")
    for command in (
        f"req -x509 {KEY} {usage} -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem",
        f"req -x509 {KEY} {usage} -nodes -days 2 -subj /CN=other -keyout other.key -out other.pem",
        f"req {KEY} -nodes -subj /CN=server -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
        " -extfile server.ext -out server.pem",
    ):
        subprocess.run(  # noqa: S603 - a command of our own
            [openssl, *command.split()], cwd=path, check=True, capture_output=True
        )
    return path


def merged(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch, as RFC 7396 defines it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


class APIServer:
    """The part of an API server that serves one pod.

    Attributes:
        token: The token that it accepts.
        failures: The statuses of the next answers; 0: no answer at all.
        pod: The stored pod.
        costs: The deletion costs that were written, oldest first.
        answers: The statuses of all answers.
        service_account: The directory that a pod would have mounted.
    """

    def __init__(self, service_account: Path) -> None:
        self.token = "first.token-1"  # noqa: S105 - of the test
        self.failures: list[int] = []
        self.pod: dict[str, Any] = {"metadata": {"name": POD, "annotations": {"kept": "yes"}}}
        self.costs: asyncio.Queue[str] = asyncio.Queue()
        self.answers: list[int] = []
        self.service_account = service_account
        self.port = 0

    def plugin(self, **settings: Any) -> Kubernetes:
        """Return the plugin of a worker in the pod."""
        return Kubernetes(service_account=self.service_account, **{"interval": 1.0} | settings)

    def rotate_token(self) -> None:
        """Accept only a new token, and write it to the mounted file as the kubelet does."""
        self.token += "-rotated"
        new = self.service_account / "token.new"
        new.write_text(f"{self.token}\n")
        new.replace(self.service_account / "token")

    async def next_cost(self, wanted: str) -> None:
        """Wait until this deletion cost is written."""
        async with asyncio.timeout(SECONDS):
            while await self.costs.get() != wanted:
                pass

    async def handle(self, request: web.Request) -> web.Response:
        status = self._status_for(request)
        if status == 0:
            await asyncio.Event().wait()  # cancelled when the client closes the connection
        self.answers.append(status)
        if status != 200:
            headers = {"Location": "/elsewhere"} if status == 302 else {}
            message = f'pods "{POD}": refused with {status}'
            body = {"kind": "Status", "status": "Failure", "message": message, "code": status}
            return web.json_response(body, status=status, headers=headers)
        self.pod = merged(self.pod, json.loads(await request.text()))
        self.costs.put_nowait(self.pod["metadata"]["annotations"][DELETION_COST])
        return web.json_response(self.pod)

    def _status_for(self, request: web.Request) -> int:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return 401
        if request.path != f"/api/v1/namespaces/{NAMESPACE}/pods/{POD}":
            return 404
        if request.method != "PATCH":
            return 405
        if request.content_type != "application/merge-patch+json":
            return 415
        return self.failures.pop(0) if self.failures else 200


class Warnings(logging.Handler):
    """The texts of the plugin's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.put_nowait(record.getMessage())

    async def next(self) -> str:
        """Wait for the next warning."""
        async with asyncio.timeout(SECONDS):
            return await self.texts.get()


@pytest.fixture
async def warnings() -> AsyncIterator[Warnings]:
    handler = Warnings()
    logger = logging.getLogger("workpool.kubernetes")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
async def server(
    pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[APIServer]:
    """Return a running API server; the process looks like a worker in its pod."""
    server = APIServer(tmp_path)
    (tmp_path / "token").write_text(f"{server.token}\n")
    (tmp_path / "namespace").write_text(NAMESPACE)
    (tmp_path / "ca.crt").write_bytes((pki / "ca.pem").read_bytes())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pki / "server.pem", pki / "server.key")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
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
