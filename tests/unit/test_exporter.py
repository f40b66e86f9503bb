"""The HTTP exporter over a real socket: its responses, its addresses, and its shutdown."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
from collections import Counter as Multiset
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import prometheus_client.openmetrics.parser as openmetrics
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from tests.unit.event_loops import LOOP_FACTORIES
from workpool.errors import ListenError
from workpool.exporter import SCRAPES_MAX, Exporter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from prometheus_client.metrics_core import Metric

FDS = Path("/proc/self/fd")
COUNTS_FILES = pytest.mark.skipif(not FDS.exists(), reason="this platform has no /proc/self/fd")


class FakeHealthFailureReasons:
    """The reasons for which `/healthz` and `/readyz` report failure; a test changes them."""

    def __init__(self) -> None:
        self.health: list[str] = []
        self.readiness: list[str] = []


class HangingCollector(Collector):
    """A metrics collector that returns only after the event `released` is set."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.released = threading.Event()

    def collect(self) -> Iterator[Metric]:
        self.entered.set()
        self.released.wait(20)
        yield GaugeMetricFamily("unstuck", "It answered.", value=1)


class FailingCollector(Collector):
    """A metrics collector that raises an exception."""

    def collect(self) -> Iterator[Metric]:
        raise ValueError("sess_secret")


def make_exporter(
    registry: CollectorRegistry, verdicts: FakeHealthFailureReasons, port: int = 0
) -> Exporter:
    return Exporter(
        "127.0.0.1", port, registry,
        health=lambda: verdicts.health, readiness=lambda: verdicts.readiness,
    )  # fmt: skip


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("eggs", "Laid.", registry=registry).inc(7)
    return registry


@pytest.fixture
def health_failure_reasons() -> FakeHealthFailureReasons:
    return FakeHealthFailureReasons()


@pytest.fixture
async def exporter(
    registry: CollectorRegistry, health_failure_reasons: FakeHealthFailureReasons
) -> AsyncIterator[Exporter]:
    async with make_exporter(registry, health_failure_reasons) as exporter:
        yield exporter


@pytest.fixture
async def http_client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
        yield session


async def send_get_request(
    http: aiohttp.ClientSession, url: str, **headers: str
) -> tuple[int, bytes, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.get(url, headers={"Accept-Encoding": "identity", **named}) as response:
        return response.status, await response.read(), response.headers


async def test_metrics_are_text_by_default(
    exporter: Exporter, http_client: aiohttp.ClientSession
) -> None:
    status, body, headers = await send_get_request(http_client, f"{exporter.url}/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = [s for f in parse_text(body.decode()) for s in f.samples]
    assert ("eggs_total", 7.0) in [(s.name, s.value) for s in samples]


async def test_metrics_are_openmetrics_on_request(
    exporter: Exporter, http_client: aiohttp.ClientSession
) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    status, body, headers = await send_get_request(
        http_client, f"{exporter.url}/metrics", Accept=accept
    )
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    parse: Callable[[str], Iterator[Metric]] = openmetrics.text_string_to_metric_families
    assert [family.name for family in parse(body.decode())] == ["eggs"]


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text;version=new", "text/plain;version=x.y", ",;="]
)
async def test_malformed_accept_header_gets_metrics_as_text(
    exporter: Exporter, http_client: aiohttp.ClientSession, accept: str
) -> None:
    status, body, headers = await send_get_request(
        http_client, f"{exporter.url}/metrics", Accept=accept
    )
    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "text/plain")
    assert b"eggs_total 7.0" in body


async def test_metrics_are_compressed_on_request(
    exporter: Exporter, http_client: aiohttp.ClientSession
) -> None:
    status, body, headers = await send_get_request(
        http_client, f"{exporter.url}/metrics", Accept_Encoding="br, gzip"
    )
    assert (status, headers["Content-Encoding"]) == (200, "gzip")
    assert b"eggs_total 7.0" in gzip.decompress(body)


@pytest.mark.parametrize(
    ("path", "good", "bad"), [("healthz", "healthy", "unhealthy"), ("readyz", "ready", "unready")]
)
async def test_failing_health_response_states_its_reasons(
    exporter: Exporter, http_client: aiohttp.ClientSession,
    health_failure_reasons: FakeHealthFailureReasons, path: str, good: str, bad: str,
) -> None:  # fmt: skip
    async with http_client.get(f"{exporter.url}/{path}") as response:
        assert (response.status, await response.json()) == (200, {"status": good})
    reasons = ["draining", "no poll succeeded in the last 30 s"]
    (health_failure_reasons.health if path == "healthz" else health_failure_reasons.readiness)[
        :
    ] = reasons
    async with http_client.get(f"{exporter.url}/{path}") as response:
        assert response.status == 503
        assert await response.json() == {"status": bad, "reasons": reasons}
    other = "readyz" if path == "healthz" else "healthz"
    assert (await send_get_request(http_client, f"{exporter.url}/{other}"))[0] == 200


async def test_index_page_lists_all_paths(
    exporter: Exporter, http_client: aiohttp.ClientSession
) -> None:
    status, body, _ = await send_get_request(http_client, f"{exporter.url}/")
    assert status == 200
    assert all(path in body for path in (b"/metrics", b"/healthz", b"/readyz"))


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/readyz"])
async def test_head_is_answered_and_post_is_refused_on_every_path(
    exporter: Exporter, http_client: aiohttp.ClientSession, path: str
) -> None:
    async with http_client.head(exporter.url + path) as response:
        assert (response.status, await response.read()) == (200, b"")
    async with http_client.post(exporter.url + path, data=b"x") as response:
        assert response.status == 405


@pytest.mark.parametrize("path", ["/metric", "/metrics/", "/debug", "/healthz/x", "/../etc/passwd"])
async def test_unknown_path_is_not_found(
    exporter: Exporter, http_client: aiohttp.ClientSession, path: str
) -> None:
    assert (await send_get_request(http_client, exporter.url + path))[0] == 404


async def test_requests_to_exporter_are_not_logged(
    exporter: Exporter, http_client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await send_get_request(http_client, f"{exporter.url}/metrics")
    await send_get_request(http_client, f"{exporter.url}/nothing")
    assert caplog.records == []


async def test_failing_collector_fails_one_scrape_and_reveals_nothing_to_client(
    exporter: Exporter, http_client: aiohttp.ClientSession, registry: CollectorRegistry
) -> None:
    broken = FailingCollector()
    registry.register(broken)
    status, body, _ = await send_get_request(http_client, f"{exporter.url}/metrics")
    assert status == 500
    assert b"sess_secret" not in body
    assert (await send_get_request(http_client, f"{exporter.url}/healthz"))[0] == 200
    registry.unregister(broken)
    assert (await send_get_request(http_client, f"{exporter.url}/metrics"))[0] == 200


async def test_scrapes_beyond_limit_are_refused_while_health_is_answered(
    exporter: Exporter, http_client: aiohttp.ClientSession, registry: CollectorRegistry
) -> None:
    stuck = HangingCollector()
    registry.register(stuck)
    async with asyncio.TaskGroup() as group:
        scrapes = {
            group.create_task(send_get_request(http_client, f"{exporter.url}/metrics"))
            for _ in range(SCRAPES_MAX + 1)
        }
        done, waiting = await asyncio.wait(scrapes, return_when=asyncio.FIRST_COMPLETED)
        refused = [task.result() for task in done]
        assert [(status, headers["Retry-After"]) for status, _, headers in refused] == [(503, "1")]
        assert (await send_get_request(http_client, f"{exporter.url}/healthz"))[0] == 200
        stuck.released.set()
        assert [(await task)[0] for task in waiting] == [200] * SCRAPES_MAX
    assert (await send_get_request(http_client, f"{exporter.url}/metrics"))[0] == 200


async def test_exporters_on_port_0_get_different_free_ports(
    registry: CollectorRegistry, health_failure_reasons: FakeHealthFailureReasons
) -> None:
    async with (
        make_exporter(registry, health_failure_reasons) as one,
        make_exporter(registry, health_failure_reasons) as two,
    ):
        assert one.port != two.port
        assert one.url == f"http://127.0.0.1:{one.port}"


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:{}"), ("::1", "http://[::1]:{}"), ("::", "http://[::1]:{}")],  # noqa: S104 - what is tested
)
async def test_exporter_url_of_wildcard_address_can_be_opened_locally(
    registry: CollectorRegistry, http_client: aiohttp.ClientSession, host: str, url: str
) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    async with Exporter(host, 0, registry, health=list, readiness=list) as exporter:
        assert exporter.url == url.format(exporter.port)
        assert (await send_get_request(http_client, f"{exporter.url}/healthz"))[0] == 200


@pytest.mark.parametrize("host", ["", "localhost"])
@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_exporter_on_port_0_uses_same_port_on_each_address(
    new_loop: Callable[[], asyncio.AbstractEventLoop], host: str, registry: CollectorRegistry
) -> None:
    family = socket.AddressFamily
    addresses = {family.AF_INET: "127.0.0.1", family.AF_INET6: "::1"}
    every = {kind for kind, *_ in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}

    async def assert_each_address_accepts_connections() -> None:
        exporter = Exporter(host, 0, registry, health=list, readiness=list)
        async with asyncio.timeout(20), exporter:
            for kind in every:
                _, writer = await asyncio.open_connection(addresses[kind], exporter.port)
                writer.close()
                await writer.wait_closed()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(assert_each_address_accepts_connections())


async def test_port_in_use_raises_error_that_suggests_solutions(
    exporter: Exporter,
    registry: CollectorRegistry,
    health_failure_reasons: FakeHealthFailureReasons,
) -> None:
    with pytest.raises(ListenError) as caught:
        async with make_exporter(registry, health_failure_reasons, exporter.port):
            pass
    for part in (f"127.0.0.1:{exporter.port}", "metrics_listen", "second pool", "port 0", "off"):
        assert part in str(caught.value)


async def test_listen_address_of_another_host_raises_listen_error(
    registry: CollectorRegistry,
) -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:0 .*metrics_listen") as caught:
        async with Exporter("192.0.2.1", 0, registry, health=list, readiness=list):
            pass
    assert "second pool" not in str(caught.value)


def count_open_resources() -> tuple[Multiset[str], set[str], int]:
    """Return the open sockets, the exporter threads and the task count of this process."""
    sockets = Multiset(
        link for fd in FDS.iterdir() if (link := read_link_target(fd)).startswith("socket:")
    )
    threads = {t.name for t in threading.enumerate() if t.name.startswith("workpool-metrics")}
    return sockets, threads, len(asyncio.all_tasks())


def read_link_target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        # `FDS.iterdir()` also lists the descriptor that it opened to read the directory. That
        # descriptor is closed by now.
        return ""


async def connect_without_reading(port: int, request: bytes) -> socket.socket:
    """Connect a client that sends `request` and never reads the response."""
    client = socket.socket()
    client.settimeout(0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, request)
    return client


async def close_exporter_with_unread_clients(registry: CollectorRegistry) -> None:
    loop = asyncio.get_running_loop()
    get_metrics = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    before = count_open_resources()
    async with Exporter("127.0.0.1", 0, registry, health=list, readiness=list) as exporter:
        idle = await connect_without_reading(
            exporter.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert (await loop.sock_recv(idle, 4096)).startswith(b"HTTP/1.1 200")
        clients = [
            idle,
            await connect_without_reading(exporter.port, b""),
            await connect_without_reading(exporter.port, b"GET /metrics HTTP/1.1\r\nHo"),
            await connect_without_reading(exporter.port, get_metrics * 50),
        ]
        reading = await connect_without_reading(exporter.port, get_metrics)
        assert await loop.sock_recv(reading, 10) == b"HTTP/1.1 2"
        clients.append(reading)
    for client in clients:
        client.close()
    assert count_open_resources() == before


@COUNTS_FILES
@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_connected_clients_do_not_delay_closing_of_exporter(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    registry = CollectorRegistry()
    big = Counter("big", "More than the sockets' buffers hold.", ["name"], registry=registry)
    for i in range(5000):
        big.labels(f"{i:0500}").inc()

    async def close_exporter_within_time_limit() -> None:
        async with asyncio.timeout(20):
            await close_exporter_with_unread_clients(registry)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(close_exporter_within_time_limit())


class ObservedExporterRun:
    """Opens, uses and closes an exporter; a test can wait for each of these stages."""

    STAGES = ("starting", "serving", "closing")

    def __init__(self, last: str) -> None:
        self.begun = {stage: asyncio.Event() for stage in self.STAGES}
        self.ended_in = ""
        self._last = last

    async def open_use_and_close_exporter(self) -> None:
        self._record_exporter_stage("starting")
        async with Exporter("127.0.0.1", 0, CollectorRegistry(), health=list, readiness=list):
            self._record_exporter_stage("serving")
            if self._last == "serving":
                await asyncio.Event().wait()
            self._record_exporter_stage("closing")
        self.ended_in = "nothing"

    def _record_exporter_stage(self, stage: str) -> None:
        self.ended_in = stage
        self.begun[stage].set()


@COUNTS_FILES
@pytest.mark.parametrize("stage", ObservedExporterRun.STAGES)
@pytest.mark.parametrize("new_loop", LOOP_FACTORIES)
def test_exporter_cancelled_at_any_stage_leaves_nothing_open(
    new_loop: Callable[[], asyncio.AbstractEventLoop], stage: str
) -> None:
    async def cancel_exporter_after_loop_turns(turns: int) -> str:
        run = ObservedExporterRun(stage)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            task = group.create_task(run.open_use_and_close_exporter())
            await run.begun[stage].wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
        return run.ended_in

    async def cancel_exporter_after_each_loop_turn() -> None:
        before = count_open_resources()
        for turns in range(20):
            ended_in = await cancel_exporter_after_loop_turns(turns)
            assert count_open_resources() == before, turns
            assert turns or ended_in == stage

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(cancel_exporter_after_each_loop_turn())


@COUNTS_FILES
async def test_exporter_opened_fifty_times_leaves_nothing_open(registry: CollectorRegistry) -> None:
    before = count_open_resources()
    exporter = Exporter("127.0.0.1", 0, registry, health=list, readiness=list)
    for _ in range(50):
        exporter = Exporter("127.0.0.1", exporter.port, registry, health=list, readiness=list)
        async with exporter, aiohttp.ClientSession() as http:
            assert (await send_get_request(http, f"{exporter.url}/metrics"))[0] == 200
    assert count_open_resources() == before


async def test_hanging_collector_does_not_delay_closing_of_exporter(
    registry: CollectorRegistry,
    health_failure_reasons: FakeHealthFailureReasons,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stuck = HangingCollector()
    registry.register(stuck)
    # Closing must not wait for the collector, which hangs for 20 s.
    async with asyncio.timeout(15):
        async with make_exporter(registry, health_failure_reasons) as exporter:
            client = await connect_without_reading(
                exporter.port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            await asyncio.to_thread(stuck.entered.wait)
    assert "abandoned" in caplog.text
    client.close()
    stuck.released.set()
    for thread in threading.enumerate():
        if thread.name.startswith("workpool-metrics"):
            await asyncio.to_thread(thread.join)
