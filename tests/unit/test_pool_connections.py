"""The pool's connections, host lookups and token files, which blocking user code must not delay."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.manual_clock import ManualClock
from tests.unit.event_loops import run_ready_tasks
from workpool import Settings, WorkClient
from workpool.errors import RefusedError, SettingsError, TransientError
from workpool.pool.lease_renewer import new_event_loop
from workpool.wire.http import resolver, transport
from workpool.wire.http.call_options import CallOptions, Priority
from workpool.wire.http.connections import BUFFER_BYTES, POOL_BUFFER_BYTES
from workpool.wire.http.daemon_threads import DaemonThreads
from workpool.wire.http.resolver import ThreadedDnsResolver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

WORK, TOKEN = "work_1", "token"
ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"
DENIED = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
STOP = CallOptions(priority=Priority.COMPLETION)


@dataclass
class ConnectionCountingServer:
    """A server that records the first line of each request and counts its connections.

    Attributes:
        answer: Returns the answer to a request from its head and the number of its connection;
            None leaves the request without an answer.
        lines: The first line of each request, in order.
        connections: The number of accepted connections.
    """

    answer: Callable[[str, int], bytes | None] = lambda _line, _connection: ANSWER
    lines: list[str] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def answer_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        connection = self.connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = head.partition("Content-Length: ")[2].split("\r\n")[0]
                await reader.readexactly(int(length or 0))
                self.lines.append(head.splitlines()[0])
                async with self.changed:
                    self.changed.notify_all()
                if (answer := self.answer(head, connection)) is not None:
                    writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def wait_for_requests(self, count: int) -> None:
        async with self.changed, asyncio.timeout(30):
            await self.changed.wait_for(lambda: len(self.lines) >= count)

    def settings_for_url(self, host: str = "127.0.0.1", **values: Any) -> Settings:
        values = values if "token_file" in values else {"token": TOKEN, **values}
        url = f"http://{host}:{self.port}"
        return Settings(base_url=url, environment_id="env_1", **values)


@asynccontextmanager
async def running_server(
    answer: Callable[[str, int], bytes | None] = lambda _line, _connection: ANSWER,
) -> AsyncIterator[ConnectionCountingServer]:
    server = ConnectionCountingServer(answer)
    listener = await asyncio.start_server(server.answer_connection, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    async with listener:
        yield server


@pytest.fixture
async def block_all_threads_of_default_executor() -> AsyncIterator[None]:
    """Block every thread of the event loop's default executor, as code in handlers could."""
    release = threading.Event()
    loop = asyncio.get_running_loop()
    blocked = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    yield
    release.set()
    await asyncio.gather(*blocked)


def deny_old_token(head: str, _: int) -> bytes:
    return DENIED if "Bearer old" in head else ANSWER


@pytest.mark.usefixtures("block_all_threads_of_default_executor")
async def test_client_calls_succeed_while_all_default_executor_threads_are_busy(
    tmp_path: Path,
) -> None:
    """The client looks up a host name and reads a renewed token; each of the two needs a thread."""
    path = tmp_path / "token"
    path.write_text("old")
    async with running_server(deny_old_token) as server:
        async with WorkClient(server.settings_for_url("localhost", token_file=path)) as client:
            path.write_text("new")
            await client.stop(WORK, force=True, timeout=20)
            for priority in Priority:
                options = CallOptions(priority=priority, new_connection=True)
                await client.stop(WORK, force=True, timeout=20, options=options)
        assert len(server.lines) == 5


async def test_calls_by_pool_do_not_wait_for_two_hundred_calls_by_handlers() -> None:
    def answer_stop_requests_only(head: str, _: int) -> bytes | None:
        return ANSWER if "/stop" in head else None

    async with (
        running_server(answer_stop_requests_only) as server,
        WorkClient(server.settings_for_url(concurrency=1, request_timeout=30)) as client,
        asyncio.TaskGroup() as group,
    ):
        updates = [
            group.create_task(client.update_metadata(WORK, {"step": str(number)}))
            for number in range(200)
        ]
        # The calls of handlers share 16 + `concurrency` connections, so here they share 17.
        await server.wait_for_requests(17)
        await client.stop(WORK, force=True, timeout=20, options=STOP)
        asked: list[asyncio.Task[Any]] = [
            group.create_task(client.poll()),
            group.create_task(client.ack(WORK)),
            group.create_task(client.heartbeat(WORK)),
        ]
        await server.wait_for_requests(17 + 1 + 3)
        assert server.connections == 17 + 3
        for task in (*updates, *asked):
            task.cancel()


async def test_each_of_150_concurrent_heartbeats_gets_its_own_connection() -> None:
    async with (
        running_server(lambda _line, _connection: None) as server,
        WorkClient(server.settings_for_url(concurrency=1)) as client,
        asyncio.TaskGroup() as group,
    ):
        heartbeats = [group.create_task(client.heartbeat(WORK, timeout=60)) for _ in range(150)]
        await server.wait_for_requests(150)
        assert server.connections == 150
        for task in heartbeats:
            task.cancel()


async def test_call_that_demands_new_connection_does_not_reuse_existing_one() -> None:
    async with running_server() as server, WorkClient(server.settings_for_url()) as client:
        for _ in range(3):
            await client.stop(WORK, options=STOP)
        assert server.connections == 1
        for count in (2, 3):
            await client.stop(WORK, options=STOP._replace(new_connection=True))
            assert server.connections == count
        await client.stop(WORK, options=STOP)
        assert server.connections == 3


async def test_call_repeated_because_of_silent_connection_uses_new_connection() -> None:
    """After a network failure, connections that nobody closed stay open but receive no answers."""
    silent = False

    def answer_unless_server_is_silent(_: str, connection: int) -> bytes | None:
        return None if silent and connection <= 2 else ANSWER

    async with (
        running_server(answer_unless_server_is_silent) as server,
        WorkClient(server.settings_for_url()) as client,
    ):
        # Two concurrent calls open two connections, which stay in the client's connection pool.
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(client.stop(WORK, options=STOP))
        assert server.connections == 2
        silent = True
        with pytest.raises(TransientError):
            await client.stop(WORK, timeout=0.1, options=STOP)
        await client.stop(WORK, timeout=20, options=STOP._replace(new_connection=True))


class HangingCredentialReader:
    """A reader of credentials that hangs until `release` is set, as if the disk did not answer.

    Attributes:
        reads: The number of started reads.
        started: Set when the first read starts.
    """

    def __init__(self) -> None:
        self.reads = 0
        self.started = threading.Event()
        self.release = threading.Event()

    def __call__(self, *_: object) -> str:
        self.reads += 1
        self.started.set()
        self.release.wait()
        return "new"


@pytest.fixture
def hanging_credential_reader() -> Iterator[HangingCredentialReader]:
    disk = HangingCredentialReader()
    yield disk
    disk.release.set()


async def test_concurrent_calls_share_one_reading_of_token_file_that_hangs(
    hanging_credential_reader: HangingCredentialReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    all_denied = asyncio.Event()
    codes: list[str] = []

    def record_status(_call: str, code: str, _seconds: float) -> None:
        codes.append(code)
        if len(codes) == 40:
            all_denied.set()

    async with running_server(deny_old_token) as server:
        client = WorkClient(server.settings_for_url(token_file=path))
        client.on_request = record_status
        async with client, asyncio.timeout(50), asyncio.TaskGroup() as group:
            monkeypatch.setattr("workpool.settings.read_credential", hanging_credential_reader)
            calls = [group.create_task(client.stop(WORK, timeout=40)) for _ in range(40)]
            await all_denied.wait()
            assert codes == ["401"] * 40
            # Each call requests a read at once after its 401, so a second read would start here.
            await run_ready_tasks()
            assert await asyncio.to_thread(hanging_credential_reader.started.wait, 20)
            assert not any(call.done() for call in calls)
            hanging_credential_reader.release.set()
        assert hanging_credential_reader.reads == 1


async def test_denied_call_ends_at_its_time_limit_although_reading_of_token_file_hangs(
    hanging_credential_reader: HangingCredentialReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    clock = ManualClock(1000.0)

    def advance_clock_after_denial(_call: str, code: str, _seconds: float) -> None:
        # Of the call's 40 s, 0.1 s are left for the reading of the file.
        if code == "401":
            clock.advance(39.9)

    async with running_server(deny_old_token) as server:
        client = WorkClient(server.settings_for_url(token_file=path, request_timeout=60))
        client.on_request = advance_clock_after_denial
        async with client, asyncio.timeout(50):
            monkeypatch.setattr("workpool.settings.read_credential", hanging_credential_reader)
            began = time.monotonic()
            with monkeypatch.context() as patch:
                patch.setattr(transport, "time", SimpleNamespace(monotonic=clock))
                with pytest.raises(RefusedError):
                    await client.stop(WORK, timeout=40)
            assert time.monotonic() - began < 30
            hanging_credential_reader.release.set()
            await client.stop(WORK, timeout=40)


async def test_client_opening_with_token_file_that_hangs_fails_in_bounded_time(
    hanging_credential_reader: HangingCredentialReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workpool.settings.read_credential", hanging_credential_reader)
    settings = Settings(
        base_url="http://127.0.0.1:1",
        environment_id="env_1",
        token_file=tmp_path / "token",
        request_timeout=0.1,
    )
    with pytest.raises(SettingsError, match="in time"):
        async with WorkClient(settings):
            pass


def test_hanging_host_lookup_does_not_keep_interpreter_running() -> None:
    program = textwrap.dedent("""
        import asyncio, socket, threading
        from workpool import Settings, WorkClient
        from workpool.errors import TransientError

        socket.getaddrinfo = lambda *_, **__: threading.Event().wait()

        async def main():
            settings = Settings(
                base_url="http://pool.invalid", environment_id="env_1", token="token"
            )
            async with WorkClient(settings) as client:
                try:
                    await client.stats(timeout=0.1)
                except TransientError as error:
                    print(error.reason)

        asyncio.run(main())
    """)
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=False
    )
    assert (done.stdout, done.returncode) == ("timeout\n", 0), done.stderr


async def test_daemon_threads_are_named_and_end_on_close() -> None:
    threads = DaemonThreads("workpool-test", 3)
    loop = asyncio.get_running_loop()
    first = await loop.run_in_executor(threads, threading.current_thread)
    assert first.daemon
    assert first.name == "workpool-test-1"
    await threads.close()
    assert first not in threading.enumerate()
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit(print)


async def test_close_does_not_wait_for_hanging_daemon_thread() -> None:
    threads, release = DaemonThreads("workpool-test", 2), threading.Event()
    loop = asyncio.get_running_loop()
    hung = loop.run_in_executor(threads, release.wait)
    async with asyncio.timeout(20):
        await threads.close()
    assert not hung.done()
    release.set()
    assert await hung


async def test_daemon_threads_run_queued_calls_and_return_their_results_or_errors() -> None:
    threads = DaemonThreads("workpool-test", 2)
    barrier = threading.Barrier(2)
    both = [threads.submit(barrier.wait, 20) for _ in range(2)]
    assert sorted(future.result(20) for future in both) == [0, 1]
    assert isinstance(threads.submit(int, "x").exception(20), ValueError)
    release = threading.Event()
    held = [threads.submit(release.wait) for _ in range(2)]
    queued = [threads.submit(threading.current_thread) for _ in range(4)]
    assert queued[0].cancel()
    release.set()
    assert all(future.result(20) for future in held)
    names = {future.result(20).name for future in queued[1:]}
    assert names <= {"workpool-test-1", "workpool-test-2"}
    await threads.close()


async def test_daemon_threads_run_calls_with_context_variables_of_caller() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    missing: dict[str, str] = {}
    name.set("caller")
    threads = DaemonThreads("workpool-test", 1)
    assert await threads.run(name.get) == "caller"
    with pytest.raises(LookupError):
        await threads.run(missing.__getitem__, "x")
    await threads.close()


async def test_call_uses_existing_thread_if_no_further_thread_can_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, release = DaemonThreads("workpool-test", 2), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_to_start_thread)
        with pytest.raises(OSError, match="no thread can be started") as raised:
            threads.submit(print)
    assert raised.value.errno == errno.EAGAIN
    held = threads.submit(release.wait)
    monkeypatch.setattr(threading.Thread, "start", refuse_to_start_thread)
    queued = threads.submit(int, "7")
    release.set()
    assert (held.result(20), queued.result(20)) == (True, 7)
    await threads.close()


def refuse_to_start_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def test_call_after_hanging_host_lookup_looks_host_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release, look_up = threading.Event(), socket.getaddrinfo

    def hang_at_first_lookup(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        release.wait()
        return look_up(*arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", hang_at_first_lookup)
    monkeypatch.setattr(resolver, "LOOKUP_SECONDS", 0.1)
    async with (
        running_server() as server,
        WorkClient(server.settings_for_url("localhost")) as client,
    ):
        with pytest.raises(TransientError):
            await client.stop(WORK, timeout=20)
        # The next lookup does not hang. It may take longer than 0.1 s on a loaded machine.
        monkeypatch.setattr(resolver, "LOOKUP_SECONDS", 20)
        await client.stop(WORK, timeout=20)
    release.set()


async def test_resolver_returns_numeric_addresses() -> None:
    threads = DaemonThreads("workpool-test", 1)
    found = await ThreadedDnsResolver(threads).resolve("localhost", 80)
    assert {(each["host"], each["port"]) for each in found} == {("127.0.0.1", 80)}
    with pytest.raises(OSError, match=r".") as raised:
        await ThreadedDnsResolver(threads).resolve("no-such-host.invalid", 80, socket.AF_INET)
    assert isinstance(raised.value, socket.gaierror)
    await threads.close()


FLOOD = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    connection = listener.accept()[0]
    connection.recv(65536)
    try:
        while True:
            connection.sendall(b"HTTP/1.1 102 Processing\\r\\n\\r\\n" * 40_000)
    except OSError:
        pass
"""


def test_endless_informational_responses_do_not_block_event_loop() -> None:
    """uvloop, which workers use, reads as long as bytes arrive and runs nothing else meanwhile."""

    async def measure_loop_turn_times(port: int) -> list[float]:
        times: list[float] = []

        async def record_time_of_each_loop_turn() -> None:
            while True:
                times.append(time.thread_time())
                await asyncio.sleep(0)

        server = ConnectionCountingServer(port=port)
        client = WorkClient(server.settings_for_url(request_timeout=30))
        async with client, asyncio.TaskGroup() as group:
            noting = group.create_task(record_time_of_each_loop_turn())
            with pytest.raises(TransientError, match="InformationalFlood"):
                await client.stop(WORK)
            noting.cancel()
        return times

    flood = subprocess.Popen([sys.executable, "-c", FLOOD], stdout=subprocess.PIPE)  # noqa: S603 - our own words
    assert flood.stdout is not None
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            times = runner.run(measure_loop_turn_times(int(flood.stdout.readline())))
    finally:
        flood.kill()
        flood.wait()
        flood.stdout.close()
    longest_turn_cpu_seconds = max(after - before for before, after in pairwise(times))
    assert longest_turn_cpu_seconds < 0.8


@pytest.mark.parametrize("priority", [Priority.COMPLETION, Priority.HANDLER])
async def test_receive_buffer_size_of_connection_depends_on_priority_of_call(
    priority: Priority,
) -> None:
    """The loop parses the bytes of one receive call without a break, which delays other calls."""
    sizes: list[int] = []
    connect = socket.socket.setsockopt

    def record_buffer_size(self: socket.socket, level: int, option: int, value: int) -> None:
        connect(self, level, option, value)
        if option == socket.SO_RCVBUF:
            sizes.append(value)

    async with running_server() as server, WorkClient(server.settings_for_url()) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "setsockopt", record_buffer_size)
            await client.stop(WORK, options=CallOptions(priority=priority))
    expected = POOL_BUFFER_BYTES if priority is Priority.COMPLETION else BUFFER_BYTES
    assert sizes == [expected]
