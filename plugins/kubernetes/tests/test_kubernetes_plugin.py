"""Pools with the plugin, and an API server with TLS and tokens."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING

import pytest

from plugins.kubernetes.tests.conftest import NAMESPACE, POD
from workpool import PluginError, Session, handler
from workpool.events import SessionFinished
from workpool_kubernetes import Kubernetes
from workpool_kubernetes.plugin import DELETION_COST

if TYPE_CHECKING:
    from pathlib import Path

    from plugins.kubernetes.tests.conftest import APIServer, Warnings
    from workpool.testing import Kit


class Held:
    """A handler whose sessions run until the test ends them."""

    def __init__(self) -> None:
        self.end = asyncio.Event()

    @handler
    async def hold(self, session: Session) -> None:
        del session
        await self.end.wait()


@handler
async def done(session: Session) -> None:
    del session


async def test_cost_of_the_pod_is_the_number_of_its_sessions(
    workpool: Kit, server: APIServer
) -> None:
    held = Held()
    async with workpool.pool(server.plugin(), held):
        await server.next_cost("0")
        workpool.enqueue(3)
        await server.next_cost("3")
        held.end.set()
        await server.next_cost("0")
    assert server.pod["metadata"]["annotations"] == {"kept": "yes", DELETION_COST: "0"}


async def test_pools_of_one_process_are_counted_together_and_written_once(
    workpool: Kit, server: APIServer
) -> None:
    held = Held()
    first = workpool.pool(server.plugin(), held, concurrency=2)
    async with first:
        await server.next_cost("0")
        async with workpool.pool(server.plugin(), held, concurrency=2):
            workpool.enqueue(4)
            await server.next_cost("4")
            await first.drain(0)
            await first.wait()
            await server.next_cost("2")  # the plugin of the other pool writes now
            held.end.set()
            await server.next_cost("0")


async def test_token_that_was_rotated_is_used_for_the_next_write(
    workpool: Kit, server: APIServer, warnings: Warnings
) -> None:
    held = Held()
    async with workpool.pool(server.plugin(), held):
        await server.next_cost("0")
        server.rotate_token()
        workpool.enqueue()
        await server.next_cost("1")
        held.end.set()
    assert warnings.texts.empty()


async def test_service_account_without_role_runs_sessions_and_logs_the_missing_role(
    workpool: Kit, server: APIServer, warnings: Warnings
) -> None:
    server.failures = [403] * 100
    workpool.enqueue()
    async with workpool.pool(server.plugin(), done):
        finished = await workpool.wait_for(SessionFinished)
        text = await warnings.next()
    assert finished.outcome == "completed"
    assert f"may not patch the pod {POD}" in text
    assert f"in namespace {NAMESPACE}, it needs a Role with the verb patch for pods" in text


@pytest.mark.parametrize("status", [429, 500, 503, 302])
async def test_cost_is_written_after_a_failure_of_the_api_server(
    workpool: Kit, server: APIServer, warnings: Warnings, status: int
) -> None:
    server.failures = [status]
    async with workpool.pool(server.plugin(), done):
        text = await warnings.next()
        await server.next_cost("0")
    assert warnings.texts.empty()
    assert f"the API server answered {status}" in text


async def test_name_that_is_no_pod_is_logged_with_the_variable_to_set(
    workpool: Kit,
    server: APIServer,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Warnings,
) -> None:
    monkeypatch.delenv("POD_NAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    async with workpool.pool(server.plugin(), done):
        text = await warnings.next()
    assert "has no pod node-7: set POD_NAME from metadata.name" in text


async def test_api_server_with_untrusted_certificate_receives_no_token(
    workpool: Kit, server: APIServer, pki: Path, warnings: Warnings
) -> None:
    (server.service_account / "ca.crt").write_bytes((pki / "other.pem").read_bytes())
    workpool.enqueue()
    async with workpool.pool(server.plugin(), done):
        finished = await workpool.wait_for(SessionFinished)
        text = await warnings.next()
    assert finished.outcome == "completed"
    assert "Certificate" in text
    assert server.answers == []


async def test_silent_api_server_delays_neither_session_nor_end(
    workpool: Kit, server: APIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for the answer would exceed the timeout of the test."""
    monkeypatch.setattr("workpool_kubernetes.api_server.CALL_SECONDS", 3600)
    server.failures = [0] * 10
    workpool.enqueue()
    async with workpool.pool(server.plugin(), done):
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"


async def test_token_is_in_no_log_and_no_error(
    workpool: Kit, server: APIServer, warnings: Warnings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token, server.token = server.token, "another"
    async with workpool.pool(server.plugin(), done):
        text = await warnings.next()
    assert "refuses the token in" in text
    assert token not in caplog.text


@pytest.mark.parametrize("content", ["", "two\nlines", "töken"])
async def test_file_without_token_is_logged_without_its_content(
    workpool: Kit, server: APIServer, warnings: Warnings, content: str
) -> None:
    (server.service_account / "token").write_text(content)
    async with workpool.pool(server.plugin(), done):
        text = await warnings.next()
    assert text.endswith("token holds no token")


# Outside of a pod.


async def start(kit: Kit, plugin: Kubernetes) -> str:
    with pytest.raises(PluginError) as caught:
        async with kit.pool(plugin, done):
            pass
    return str(caught.value)


async def test_pool_outside_of_a_cluster_does_not_start(
    workpool: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert "not in a pod of Kubernetes" in await start(workpool, Kubernetes())


@pytest.mark.parametrize("file", ["token", "ca.crt", "namespace"])
async def test_pod_without_mounted_token_does_not_start(
    workpool: Kit, server: APIServer, file: str
) -> None:
    (server.service_account / file).unlink()
    text = await start(workpool, server.plugin())
    assert f"has no {file}" in text
    assert "automountServiceAccountToken: true" in text


@pytest.mark.parametrize("name", ["../secrets", "Pod", "a" * 254, "x\n"])
async def test_name_that_no_pod_can_have_is_refused(
    workpool: Kit, server: APIServer, name: str
) -> None:
    assert "is not the name of a pod" in await start(workpool, server.plugin(pod=name))


async def test_file_without_certificate_is_refused(workpool: Kit, server: APIServer) -> None:
    (server.service_account / "ca.crt").write_text("no certificate")
    assert "holds no certificate" in await start(workpool, server.plugin())


async def test_file_without_namespace_is_refused(workpool: Kit, server: APIServer) -> None:
    (server.service_account / "namespace").write_text("a/b")
    assert "holds no name of a namespace" in await start(workpool, server.plugin())


@pytest.mark.parametrize("interval", [0.5, float("inf"), float("nan"), "5", True])
def test_interval_that_is_no_number_of_seconds_is_refused(interval: object) -> None:
    with pytest.raises((TypeError, ValueError), match="interval"):
        Kubernetes(interval=interval)  # type: ignore[arg-type] # the mistake of the test


def test_api_server_with_ipv6_address_has_brackets_in_its_url(tmp_path: Path) -> None:
    from workpool_kubernetes.own_pod import own_pod  # noqa: PLC0415 - only this test needs it

    for file in ("token", "ca.crt", "namespace"):
        (tmp_path / file).write_text("workers")
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    pod = own_pod(environment, tmp_path, "pod-1")
    assert pod.server == "https://[fd00::1]:443"
