"""Fixtures that send HTTP requests to a control plane directly, without workpool's client."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.manual_clock import ManualClock
from tests.postgres.cluster import TEST_SECONDS, extend_database_limits
from tests.protocol.postgres_control_plane import PostgresControlPlane
from workpool.conformance.api import WorkCallClient
from workpool.server import ControlPlane, MemoryStore, PostgresStore, SqliteStore
from workpool.server.parsing import request_values
from workpool.server.postgres.migrations import migrate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from tests.postgres.cluster import Cluster
    from workpool.server import Store

ENV = "env_0199aaaaaaaa70008000000000000001"
OTHER = "env_0199aaaaaaaa70008000000000000002"
CLOUD = "env_0199aaaaaaaa70008000000000000003"
TOKEN, LIMITED = "token-of-everything", "token-of-env-only"
START = 1_772_366_400.0
"""The time 2026-03-01T12:00:00Z."""

TABLES = ("environments", "sessions", "items", "events", "history", "pollers", "stopped_counts")

WORKER_HEADER = {"qoder": "Worker-ID", "anthropic": "anthropic-worker-id"}


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.body) == {"type", "error"}
        assert self.body["type"] == "error"
        assert isinstance(self.body["error"]["message"], str)
        error: dict[str, Any] = self.body["error"]
        return error


@dataclass
class ApiClient(WorkCallClient[HttpAnswer]):
    """A test client that sends HTTP requests directly, in one dialect and for one worker."""

    plane: ControlPlane
    http: aiohttp.ClientSession
    dialect: str
    token: str | None = TOKEN
    worker: str | None = None
    extra_headers: dict[str, str] = field(default_factory=dict)
    environment: str = ENV

    @property
    def dialect_base_url(self) -> str:
        return self.plane.base_url if self.dialect == "qoder" else self.plane.anthropic_base_url

    base_url = dialect_base_url

    async def __call__(self, method: str, url: str, **options: Any) -> HttpAnswer:
        headers = {**self.extra_headers, **options.pop("headers", {})}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        worker = options.pop("worker", self.worker)
        if worker is not None:
            headers[WORKER_HEADER[self.dialect]] = worker
        async with self.http.request(method, url, headers=headers, **options) as response:
            content = await response.read()
            if content:
                assert response.headers["Content-Type"] == "application/json"
            body = await response.json() if content else None
            return HttpAnswer(response.status, body, response.headers)

    async def claim_item(self, **options: Any) -> dict[str, Any]:
        """Poll an item, and return it without its `secret`, which other calls do not return."""
        answer = await self.poll(**options)
        assert answer.status == 200
        assert answer.body is not None
        item: dict[str, Any] = answer.body
        item.pop("secret", None)
        return item

    async def item_state(self, work_id: str) -> str:
        answer = await self.get(work_id)
        assert answer.status == 200
        state: str = answer.body["state"]
        return state

    async def queue_stats(self) -> dict[str, Any]:
        answer = await self("GET", self.work_url("/stats"))
        assert answer.status == 200
        body: dict[str, Any] = answer.body
        return body

    async def create_item_in_state(self, state: str, worker: str | None = None) -> str:
        """Create an item and bring it to a state by HTTP requests; return its id."""
        (item,) = self.plane.enqueue()
        if state in {"starting", "active", "stopping"}:
            await self.claim_item(worker=worker)
            assert (await self.ack(item.id, worker=worker)).status == 200
        if state in {"active", "stopping"}:
            assert (await self.heartbeat(item.id, "NO_HEARTBEAT", worker=worker)).status == 200
        if state == "stopping":
            assert (await self.stop(item.id)).status in {200, 204}
        if state == "stopped":
            assert (await self.stop(item.id, json={"force": True})).status in {200, 204}
        assert await self.item_state(item.id) == state
        return item.id


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition that other tasks change is true."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the states of the control plane have no event
            await asyncio.sleep(0.001)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the modules `test_sdk_*` unless trials run: only trials have the SDKs installed."""
    quick = config.option.markexpr == "not trial"
    return True if quick and collection_path.name.startswith("test_sdk_") else None


@pytest.fixture
def allow_polls_of_one_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow polls that wait for a minute, so that none ends early on a slow machine."""
    monkeypatch.setattr(request_values, "BLOCK_MS_MAX", 60_000)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START)


@pytest.fixture(scope="session")
def migrated_database_url(postgres: Cluster) -> str:
    url = postgres.create_database()
    asyncio.run(migrate(url))
    return url


@pytest.fixture
def url_of_emptied_database(
    postgres: Cluster, migrated_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Delete all rows of the database that the tests share, and return its URL."""
    extend_database_limits(monkeypatch)
    statements = [f"DELETE FROM {each};" for each in TABLES]  # noqa: S608 - our own names
    postgres.execute("".join(statements), migrated_database_url)
    return migrated_database_url


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store | PostgresStore:
    kind = getattr(request, "param", "memory")
    if kind == "postgres":
        return PostgresStore(request.getfixturevalue("url_of_emptied_database"), history=True)
    return MemoryStore() if kind == "memory" else SqliteStore(tmp_path / "work.db")


@pytest.fixture
async def control_plane(
    clock: ManualClock, store: Store | PostgresStore
) -> AsyncIterator[ControlPlane]:
    options: dict[str, Any] = {
        "environments": (ENV, OTHER),
        "cloud_environments": (CLOUD,),
        "tokens": {TOKEN: None, LIMITED: frozenset({ENV})},
        "now": clock,
    }
    if isinstance(store, PostgresStore):
        shared = PostgresControlPlane(store=store, **options)
        with shared.node.run_loop_in_thread():
            async with shared:
                yield shared
        return
    async with ControlPlane(store=store, **options) as plane:
        yield plane


@pytest.fixture
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(params=["qoder", "anthropic"])
def dialect(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def api(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, dialect: str
) -> ApiClient:
    return ApiClient(control_plane, http_session, dialect)


@pytest.fixture
def qoder_api(control_plane: ControlPlane, http_session: aiohttp.ClientSession) -> ApiClient:
    return ApiClient(control_plane, http_session, "qoder")


@pytest.fixture
def anthropic_api(control_plane: ControlPlane, http_session: aiohttp.ClientSession) -> ApiClient:
    return ApiClient(control_plane, http_session, "anthropic")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with the fixture `store` once for every kind of store that the test supports.

    The memory store is the default, and the fixture `memory_and_sqlite_stores` adds SQLite. Tests
    with a control plane run on PostgreSQL too, as trials.
    """
    if "store" not in metafunc.fixturenames:
        return
    stores: list[object] = ["memory"]
    names = {*metafunc.fixturenames}
    if {"memory_and_sqlite_stores", "every_kind_of_store"} & names:
        stores.append("sqlite")
    if {"control_plane", "engine", "every_kind_of_store"} & names:
        marks = pytest.mark.trial, pytest.mark.timeout(TEST_SECONDS)
        stores.append(pytest.param("postgres", marks=marks))
    metafunc.parametrize("store", stores, indirect=True)


@pytest.fixture
def memory_and_sqlite_stores() -> None:
    """Run the test with the memory store, and once more with SQLite."""


@pytest.fixture
def every_kind_of_store() -> None:
    """Run the test with the memory store, with SQLite and, if trials run, with PostgreSQL.

    This fixture is for tests without the fixture `control_plane`.
    """
