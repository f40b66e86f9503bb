"""Fixtures for tests of a whole pool: a control plane with faults, and an event recorder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest

from tests.postgres.cluster import (
    FIXTURES,
    TEST_SECONDS,
    database_url,
    dedicated_postgres,
    postgres,
    standby,
)
from tests.reserved_port import reserve_port
from workpool import Settings, Supervisor, logs
from workpool.backoff import Backoff
from workpool.server import ControlPlane
from workpool.testing import Clock, Faults, Recorder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

# Set no deadline for the examples of Hypothesis. On a loaded machine, an example may take long
# without a fault in the code.
hypothesis.settings.register_profile("without_deadline", deadline=None)
hypothesis.settings.load_profile("without_deadline")

# These imported fixtures are used by pytest only, which finds them by name in this module.
__all__ = ["database_url", "dedicated_postgres", "postgres", "standby"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test that needs PostgreSQL as `trial`, so that `poe test` leaves it out.

    The test also gets a longer time limit, since its fixtures may create and start a cluster.
    """
    if any(name in getattr(item, "fixturenames", ()) for name in FIXTURES):
        item.add_marker(pytest.mark.trial)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in captured logs, because pytest-xdist cannot transfer them."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def forget_tokens_of_other_tests() -> None:
    """Clear the set of tokens that logs redact, because all tests of a process share the set."""
    logs._tokens.clear()
    logs._item_tokens.clear()


class PoolFactory(Protocol):
    def __call__(self, *plugins: object, **settings: Any) -> Supervisor: ...


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def clock() -> Clock:
    """Return the clock of the control plane, which a test can advance."""
    return Clock()


@pytest.fixture
async def control_plane(faults: Faults, clock: Clock) -> AsyncIterator[ControlPlane]:
    async with ControlPlane(now=clock, middlewares=[faults.middleware]) as plane:
        yield plane


@pytest.fixture
def reserved_port() -> Iterator[int]:
    """Return a port on which only the servers of this test can listen."""
    with reserve_port() as port:
        yield port


@pytest.fixture
def longest_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the random part of each delay before a retry as long as possible."""
    monkeypatch.setattr(Backoff.__init__, "__defaults__", (lambda: 1.0,))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make_settings(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Return a function that makes settings for a pool of the control plane.

    The settings of the caller's environment variables are removed, so that they have no effect.
    """
    for name in os.environ:
        if name.startswith("WORKPOOL_"):
            monkeypatch.delenv(name)
    defaults = {
        "base_url": control_plane.base_url,
        "environment_id": control_plane.environments[0],
        "pollers": 1,
        "concurrency": 4,
        "stats_interval": 0,
        "drain_timeout": 5,
        "stop_grace": 5,
    }

    def make_pool_settings(**values: Any) -> Settings:
        if "token_file" not in values:
            values.setdefault("token", control_plane.token)
        return Settings(**{**defaults, **values})

    return make_pool_settings


@pytest.fixture
def make_pool(make_settings: Callable[..., Settings], recorder: Recorder) -> PoolFactory:
    """Return a function that makes an unstarted supervisor with some plugins and the recorder."""

    def make_supervisor(*plugins: object, **settings: Any) -> Supervisor:
        return Supervisor(make_settings(**settings), plugins=[*plugins, recorder])

    return make_supervisor
