"""The supervisors of several environments in one process.

See workpool/docs/operating.md, "Several environments".
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import threading
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from tests.integration.condition_polling import wait_until
from tests.integration.test_live_page import headless_browser
from workpool import Settings, SettingsError
from workpool.cli import environment_group, exits
from workpool.cli.environment_group import EnvironmentGroup, GroupMember
from workpool.cli.rate_limit_groups import find_shared_rate_limits
from workpool.errors import LeaseRenewerError, ListenError
from workpool.pool import drain
from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path

    Running = Callable[[EnvironmentGroup], Coroutine[Any, Any, None]]

pytestmark = pytest.mark.timeout(120)

SECONDS, LONG = 30.0, 600.0
FIRST, OTHER = "env_0199cccccccc70008000000000000001", "env_0199cccccccc70008000000000000002"
KEYS = {"key-of-first-Zx9": frozenset({FIRST}), "key-of-other-Zx9": frozenset({OTHER})}
MODULE = """
import asyncio
from contextlib import asynccontextmanager, suppress
from workpool import hookimpl, handler

ended, opened, broken, instances, may_end = [], [], set(), {}, asyncio.Semaphore(0)
released = []

class Tool:
    @hookimpl
    def workpool_lifespan(self, supervisor):
        return self.open(supervisor.settings.environment_id)

    @asynccontextmanager
    async def open(self, environment_id):
        if environment_id in broken:
            raise ConnectionError("no database")
        opened.append(environment_id)
        yield

    @handler
    async def work(self, session):
        instances[session.item.environment_id] = id(self)
        if session.item.metadata.get("wait"):
            await may_end.acquire()
        while session.item.metadata.get("ignores") and not released:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        ended.append(session.item.environment_id)
"""


@pytest.fixture
async def control_plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane(environments=(FIRST, OTHER), tokens=KEYS) as control_plane:
        yield control_plane


@pytest.fixture
def plugin_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Write, import and return the module of the plugin that both environments load."""
    (tmp_path / "group_tool.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("group_tool")
    del sys.modules["group_tool"]


@pytest.fixture
def make_environment_group(
    control_plane: ControlPlane, plugin_module: Any, tmp_path: Path
) -> Callable[..., EnvironmentGroup]:
    """Return a function that makes a group from a settings file with two environments."""
    del plugin_module
    for name, token in zip(("first", "other"), KEYS, strict=True):
        (tmp_path / name).write_text(token)
    path = tmp_path / "pool.toml"
    path.write_text(f"""
        [workpool]
        base_url = "{control_plane.base_url}"
        plugins = ["group_tool:Tool"]
        [workpool.environments.{FIRST}]
        token_file = "{tmp_path / "first"}"
        [workpool.environments.{OTHER}]
        token_file = "{tmp_path / "other"}"
        """)

    def make_environment_group_from_file(**settings: Any) -> EnvironmentGroup:
        process, environments = Settings.of_environments(
            config=path, **{"metrics_listen": "127.0.0.1:0", **settings}
        )
        return EnvironmentGroup(process, environments, CollectorRegistry())

    return make_environment_group_from_file


def failure_count(group: EnvironmentGroup, environment_id: str) -> float:
    registry = group.members_by_id[environment_id].supervisor.registry
    labels = {"environment_id": environment_id}
    value = registry.get_sample_value("workpool_pool_failures_total", labels)
    assert value is not None
    return value


async def call_while_group_runs(group: EnvironmentGroup, use: Running) -> None:
    """Start the group, await `use(group)` while it runs, and drain the group."""
    async with asyncio.timeout(2 * SECONDS), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(group.run())
        try:
            await use(group)
        finally:
            group.request_drain()
        await running


async def test_each_environment_has_plugin_instance_and_lifespan_of_its_own(
    make_environment_group: Callable[..., EnvironmentGroup],
    control_plane: ControlPlane,
    plugin_module: Any,
) -> None:
    async def run_item_in_each_environment(group: EnvironmentGroup) -> None:
        for each in (FIRST, OTHER):
            control_plane.enqueue(environment_id=each)
        await wait_until(lambda: len(plugin_module.ended) == 2)
        assert group.status().ready

    await call_while_group_runs(make_environment_group(), run_item_in_each_environment)
    assert sorted(plugin_module.opened) == [FIRST, OTHER]
    assert len(set(plugin_module.instances.values())) == 2


async def test_pause_of_failed_environment_remains_after_its_restart(
    make_environment_group: Callable[..., EnvironmentGroup],
    control_plane: ControlPlane,
    plugin_module: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(environment_group, "RETRY_SECONDS", 0.05)
    caplog.set_level(logging.CRITICAL, "workpool")
    key = tmp_path / "other"
    good = key.read_text()
    key.write_text("revoked-Zx9")

    async def revoke_and_restore_key(group: EnvironmentGroup) -> None:
        other = group.members_by_id[OTHER]
        await wait_until(lambda: other.error is not None)
        other.pause("by an operator")
        key.write_text(good)
        paused = f"{OTHER}: paused: by an operator"
        await wait_until(lambda: paused in group.status().reasons)
        control_plane.enqueue(environment_id=OTHER)
        other.resume()
        await wait_until(lambda: plugin_module.ended)
        await wait_until(lambda: group.status().ready)
        assert failure_count(group, OTHER) >= 1
        assert failure_count(group, FIRST) == 0

    await call_while_group_runs(make_environment_group(), revoke_and_restore_key)
    assert plugin_module.ended == [OTHER]
    assert "environment failed: " in caplog.text
    assert "revoked-Zx9" not in caplog.text


async def test_environment_whose_plugin_cannot_open_does_not_end_other_environments(
    make_environment_group: Callable[..., EnvironmentGroup],
    control_plane: ControlPlane,
    plugin_module: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment_group, "RETRY_SECONDS", 0.05)
    plugin_module.broken.add(OTHER)

    async def check_group_while_plugin_is_broken(group: EnvironmentGroup) -> None:
        other = group.members_by_id[OTHER]
        await wait_until(lambda: isinstance(other.error, ConnectionError))
        control_plane.enqueue(environment_id=FIRST)
        await wait_until(lambda: plugin_module.ended == [FIRST])
        await wait_until(lambda: "ConnectionError" in str(group.status().reasons))
        assert failure_count(group, OTHER) >= 1
        plugin_module.broken.clear()
        await wait_until(lambda: group.status().ready)

    await call_while_group_runs(make_environment_group(), check_group_while_plugin_is_broken)
    assert plugin_module.opened == [FIRST, OTHER]


@pytest.mark.parametrize("ignores_cancellation", [False, True])
async def test_process_ends_after_lease_renewer_crash_only_if_handler_ignores_cancellation(
    make_environment_group: Callable[..., EnvironmentGroup],
    control_plane: ControlPlane,
    plugin_module: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    ignores_cancellation: bool,
) -> None:
    monkeypatch.setattr(exits, "FAILED_SECONDS", 0.05 if ignores_cancellation else 10.0)
    monkeypatch.setattr(drain, "AFTER_DEADLINE_SECONDS", 1.0 if ignores_cancellation else 25.0)
    monkeypatch.setattr(environment_group, "RETRY_SECONDS", LONG)
    ended = threading.Event()

    async def crash_one_renewer(group: EnvironmentGroup) -> None:
        group.on_blocked = ended.set
        other = group.members_by_id[OTHER]
        kind = "ignores" if ignores_cancellation else "wait"
        control_plane.enqueue(environment_id=OTHER, metadata={kind: "yes"})
        await wait_until(lambda: OTHER in plugin_module.instances)
        crash_renewer(other)
        await wait_until(lambda: other.error is not None)
        for timer in filter(lambda each: isinstance(each, threading.Timer), threading.enumerate()):
            await asyncio.to_thread(timer.join, SECONDS)
        assert ended.is_set() == ignores_cancellation
        assert group.status().error is None
        assert group.abandoned == ignores_cancellation
        healthy = f"{group.metrics_url}/healthz"
        async with aiohttp.ClientSession() as http, http.get(healthy) as answer:
            assert answer.status == 200
        plugin_module.released.append(True)
        control_plane.enqueue(environment_id=FIRST)
        await wait_until(lambda: FIRST in plugin_module.ended)
        if ignores_cancellation:
            # The group does not wait for an abandoned handler, so the test waits for the handler.
            await wait_until(lambda: OTHER in plugin_module.ended)

    with pytest.raises(ExceptionGroup) as raised:
        await call_while_group_runs(make_environment_group(), crash_one_renewer)
    assert isinstance(raised.value.exceptions[0], LeaseRenewerError)


def crash_renewer(member: GroupMember) -> None:
    """Raise an error on the thread that renews the leases of an environment."""

    def raise_error() -> None:
        raise RuntimeError("a bug")

    view = member.supervisor._view
    assert view is not None
    view.context.renewer.call_on_renewer_loop(raise_error)


async def test_environment_with_many_items_yields_shared_slots_to_environment_that_waits(
    make_environment_group: Callable[..., EnvironmentGroup],
    control_plane: ControlPlane,
    plugin_module: Any,
) -> None:
    control_plane.enqueue(10, {"wait": "yes"}, environment_id=FIRST)

    def count_running_sessions(group: EnvironmentGroup) -> list[int]:
        return [each.status().running for each in group.environments]

    async def fill_first_environment_then_other(group: EnvironmentGroup) -> None:
        await wait_until(lambda: count_running_sessions(group) == [5, 0])
        control_plane.enqueue(10, {"wait": "yes"}, environment_id=OTHER)
        await wait_until(lambda: count_running_sessions(group) == [5, 1])
        assert group.status().ready
        shown = group.live_status(show_ids=True)
        assert shown["slots"] == {"busy": 6, "reserved": 0, "free": 0, "limit": 6}
        # Sessions end in the order of their start, so those of the first environment end first.
        for now in ([4, 2], [3, 3], [3, 3]):
            ended = len(plugin_module.ended)
            plugin_module.may_end.release()
            await wait_until(lambda: len(plugin_module.ended) > ended)  # noqa: B023 - awaited in this turn
            await wait_until(lambda: count_running_sessions(group) == now)  # noqa: B023 - awaited in this turn
        for _ in range(20):
            plugin_module.may_end.release()
        await wait_until(lambda: len(plugin_module.ended) == 20)

    await call_while_group_runs(
        make_environment_group(concurrency=6), fill_first_environment_then_other
    )


async def test_environments_of_one_account_share_rate_limits(tmp_path: Path) -> None:
    def rate_limits_of_environments(**values: Any) -> list[Any]:
        path = tmp_path / "pool.toml"
        path.write_text(
            "[workpool]\nread_rate = 7\nwrite_rate = 5\n"
            + "\n".join(
                f"[workpool.environments.{name}]\ntoken = '{token}'\n{more}"
                for name, (token, more) in values.items()
            )
        )
        found = find_shared_rate_limits(Settings.of_environments(config=path)[1])
        return [found[name] for name in values]

    one, two, three = rate_limits_of_environments(a=("t", ""), b=("t", ""), c=("u", ""))
    assert one is two
    assert (one.read.rate, one.write.rate) == (7, 5)
    assert three is not one
    other_address = "base_url = 'http://127.0.0.1:1'"
    assert len(set(rate_limits_of_environments(a=("t", ""), b=("t", other_address)))) == 2
    group = "rate_limit_group = 'acme'"
    assert len(set(rate_limits_of_environments(a=("t", group), b=("u", group), c=("u", "")))) == 2
    with pytest.raises(SettingsError) as raised:
        rate_limits_of_environments(a=("secret-Zx9", ""), b=("secret-Zx9", "read_rate = 8"))
    [problem] = raised.value.problems
    assert problem == (
        "read_rate: must be the same for a, b, which share it "
        f"(from {tmp_path}/pool.toml, {tmp_path}/pool.toml [workpool.environments.b])"
    )


async def test_exit_after_idle_waits_until_every_environment_is_idle(
    make_environment_group: Callable[..., EnvironmentGroup],
    control_plane: ControlPlane,
    plugin_module: Any,
) -> None:
    control_plane.enqueue(1, {"wait": "yes"}, environment_id=OTHER)
    group = make_environment_group(exit_after_idle=0.5, block_ms=50)
    async with asyncio.timeout(2 * SECONDS), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(group.run())
        first = group.members_by_id[FIRST]
        await wait_until(lambda: first.status().idle_seconds > 1)
        assert not running.done()
        assert first.status().ready
        plugin_module.may_end.release()
        await running
    assert plugin_module.ended == [OTHER]


async def test_environment_group_with_address_in_use_fails_to_start(
    make_environment_group: Callable[..., EnvironmentGroup],
) -> None:
    async with asyncio.timeout(SECONDS):
        server = await asyncio.start_server(lambda _, __: None, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ListenError):
                await make_environment_group(metrics_listen=f"127.0.0.1:{port}").run()


@pytest.mark.trial
async def test_live_page_in_browser_shows_every_environment(
    make_environment_group: Callable[..., EnvironmentGroup],
    control_plane: ControlPlane,
    plugin_module: Any,
    tmp_path: Path,
) -> None:
    for each in (FIRST, OTHER):
        control_plane.enqueue(1, {"wait": "yes"}, environment_id=each)

    async def assert_live_page_shows_environments(group: EnvironmentGroup) -> None:
        await wait_until(lambda: group.status().running == 2)
        async with headless_browser(tmp_path) as browser:
            await browser.open_page(f"{group.metrics_url}/")
            rows = "document.getElementById('environments').textContent"
            shown = await browser.wait_for_text(rows, OTHER)
            assert FIRST in shown
            assert OTHER in await browser.run_page_script(
                "document.getElementById('sessions').textContent"
            )
            assert (
                await browser.run_page_script("document.getElementById('busy').textContent") == "2"
            )
        for _ in range(2):
            plugin_module.may_end.release()

    await call_while_group_runs(make_environment_group(), assert_live_page_shows_environments)
