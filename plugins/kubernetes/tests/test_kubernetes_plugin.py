"""Tests of pools with the plugin. The API server uses TLS and checks the token."""

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
from workpool_kubernetes.own_pod import find_own_pod
from workpool_kubernetes.plugin import DELETION_COST

if TYPE_CHECKING:
    from pathlib import Path

    from plugins.kubernetes.tests.conftest import LoggedWarnings, PodAPIServer
    from workpool.testing import Kit


class BlockingHandler:
    """A handler whose sessions run until the event `end` is set."""

    def __init__(self) -> None:
        self.end = asyncio.Event()

    @handler
    async def wait_for_end_event(self, session: Session) -> None:
        del session
        await self.end.wait()


@handler
async def return_at_once(session: Session) -> None:
    del session


async def test_deletion_cost_of_pod_equals_its_number_of_running_sessions(
    workpool: Kit, api_server: PodAPIServer
) -> None:
    blocked = BlockingHandler()
    async with workpool.pool(api_server.make_plugin(), blocked):
        await api_server.wait_for_deletion_cost("0")
        workpool.enqueue(3)
        await api_server.wait_for_deletion_cost("3")
        blocked.end.set()
        await api_server.wait_for_deletion_cost("0")
    assert api_server.pod["metadata"]["annotations"] == {"kept": "yes", DELETION_COST: "0"}


async def test_deletion_cost_is_number_of_sessions_of_all_pools_in_process(
    workpool: Kit, api_server: PodAPIServer
) -> None:
    blocked = BlockingHandler()
    first = workpool.pool(api_server.make_plugin(), blocked, concurrency=2)
    async with first:
        await api_server.wait_for_deletion_cost("0")
        async with workpool.pool(api_server.make_plugin(), blocked, concurrency=2):
            workpool.enqueue(4)
            await api_server.wait_for_deletion_cost("4")
            await first.drain(0)
            await first.wait()
            # Only the plugin of the first pool writes the deletion cost. The first pool has ended,
            # so the second pool is now the first one, and its plugin writes the deletion cost.
            await api_server.wait_for_deletion_cost("2")
            blocked.end.set()
            await api_server.wait_for_deletion_cost("0")


async def test_write_after_rotation_of_token_uses_new_token(
    workpool: Kit, api_server: PodAPIServer, logged_warnings: LoggedWarnings
) -> None:
    blocked = BlockingHandler()
    async with workpool.pool(api_server.make_plugin(), blocked):
        await api_server.wait_for_deletion_cost("0")
        api_server.rotate_token()
        workpool.enqueue()
        await api_server.wait_for_deletion_cost("1")
        blocked.end.set()
    assert logged_warnings.texts.empty()


async def test_pool_without_kubernetes_role_runs_sessions_and_logs_missing_role(
    workpool: Kit, api_server: PodAPIServer, logged_warnings: LoggedWarnings
) -> None:
    api_server.failures = [403] * 100
    workpool.enqueue()
    async with workpool.pool(api_server.make_plugin(), return_at_once):
        finished = await workpool.wait_for(SessionFinished)
        text = await logged_warnings.wait_for_warning()
    assert finished.outcome == "completed"
    assert f"may not patch the pod {POD}" in text
    assert f"in namespace {NAMESPACE}, it needs a Role with the verb patch for pods" in text


@pytest.mark.parametrize("status", [429, 500, 503, 302])
async def test_deletion_cost_is_written_again_after_error_of_api_server(
    workpool: Kit, api_server: PodAPIServer, logged_warnings: LoggedWarnings, status: int
) -> None:
    api_server.failures = [status]
    async with workpool.pool(api_server.make_plugin(), return_at_once):
        text = await logged_warnings.wait_for_warning()
        await api_server.wait_for_deletion_cost("0")
    assert logged_warnings.texts.empty()
    assert f"the API server answered {status}" in text


async def test_unknown_pod_name_is_logged_with_variable_to_set(
    workpool: Kit,
    api_server: PodAPIServer,
    monkeypatch: pytest.MonkeyPatch,
    logged_warnings: LoggedWarnings,
) -> None:
    monkeypatch.delenv("POD_NAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    async with workpool.pool(api_server.make_plugin(), return_at_once):
        text = await logged_warnings.wait_for_warning()
    assert "has no pod node-7: set POD_NAME from metadata.name" in text


async def test_api_server_with_untrusted_certificate_receives_no_token(
    workpool: Kit, api_server: PodAPIServer, certificates: Path, logged_warnings: LoggedWarnings
) -> None:
    (api_server.service_account / "ca.crt").write_bytes((certificates / "other.pem").read_bytes())
    workpool.enqueue()
    async with workpool.pool(api_server.make_plugin(), return_at_once):
        finished = await workpool.wait_for(SessionFinished)
        text = await logged_warnings.wait_for_warning()
    assert finished.outcome == "completed"
    assert "Certificate" in text
    assert api_server.answers == []


async def test_api_server_that_never_answers_delays_neither_session_nor_pool_end(
    workpool: Kit, api_server: PodAPIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session or pool that waited for the API server's answer would exceed the timeout."""
    monkeypatch.setattr("workpool_kubernetes.api_server.CALL_SECONDS", 3600)
    api_server.failures = [0] * 10
    workpool.enqueue()
    async with workpool.pool(api_server.make_plugin(), return_at_once):
        finished = await workpool.wait_for(SessionFinished)
    assert finished.outcome == "completed"


async def test_refused_token_is_not_logged(
    workpool: Kit,
    api_server: PodAPIServer,
    logged_warnings: LoggedWarnings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    token, api_server.token = api_server.token, "another"
    async with workpool.pool(api_server.make_plugin(), return_at_once):
        text = await logged_warnings.wait_for_warning()
    assert "refuses the token in" in text
    assert token not in caplog.text


@pytest.mark.parametrize("content", ["", "two\nlines", "töken"])
async def test_malformed_token_file_is_logged_without_its_content(
    workpool: Kit, api_server: PodAPIServer, logged_warnings: LoggedWarnings, content: str
) -> None:
    (api_server.service_account / "token").write_text(content)
    async with workpool.pool(api_server.make_plugin(), return_at_once):
        text = await logged_warnings.wait_for_warning()
    assert text.endswith("token holds no token")


async def catch_start_error(kit: Kit, plugin: Kubernetes) -> str:
    with pytest.raises(PluginError) as caught:
        async with kit.pool(plugin, return_at_once):
            pass
    return str(caught.value)


async def test_pool_outside_of_cluster_does_not_start(
    workpool: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert "not in a pod of Kubernetes" in await catch_start_error(workpool, Kubernetes())


@pytest.mark.parametrize("file", ["token", "ca.crt", "namespace"])
async def test_pod_without_mounted_token_does_not_start(
    workpool: Kit, api_server: PodAPIServer, file: str
) -> None:
    (api_server.service_account / file).unlink()
    text = await catch_start_error(workpool, api_server.make_plugin())
    assert f"has no {file}" in text
    assert "automountServiceAccountToken: true" in text


@pytest.mark.parametrize("name", ["../secrets", "Pod", "a" * 254, "x\n"])
async def test_malformed_pod_name_is_refused_at_start(
    workpool: Kit, api_server: PodAPIServer, name: str
) -> None:
    assert "is not the name of a pod" in await catch_start_error(
        workpool, api_server.make_plugin(pod=name)
    )


async def test_ca_file_without_certificate_is_refused_at_start(
    workpool: Kit, api_server: PodAPIServer
) -> None:
    (api_server.service_account / "ca.crt").write_text("no certificate")
    assert "holds no certificate" in await catch_start_error(workpool, api_server.make_plugin())


async def test_malformed_namespace_file_is_refused_at_start(
    workpool: Kit, api_server: PodAPIServer
) -> None:
    (api_server.service_account / "namespace").write_text("a/b")
    assert "holds no name of a namespace" in await catch_start_error(
        workpool, api_server.make_plugin()
    )


@pytest.mark.parametrize("interval", [0.5, float("inf"), float("nan"), "5", True])
def test_kubernetes_plugin_refuses_invalid_interval_setting(interval: object) -> None:
    with pytest.raises((TypeError, ValueError), match="interval"):
        Kubernetes(interval=interval)  # type: ignore[arg-type] # an invalid value on purpose


def test_api_server_with_ipv6_address_has_brackets_in_its_url(tmp_path: Path) -> None:
    for file in ("token", "ca.crt", "namespace"):
        (tmp_path / file).write_text("workers")
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    pod = find_own_pod(environment, tmp_path, "pod-1")
    assert pod.server == "https://[fd00::1]:443"
