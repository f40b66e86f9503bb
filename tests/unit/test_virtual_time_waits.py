"""Virtual time raises an error that names each thread, process or socket it cannot wait for."""

from __future__ import annotations

import asyncio
import functools
import socket
import threading
import time

import pytest

from workpool.testing.virtual_time import run_on_virtual_loop


def hash_bytes(release: threading.Event) -> str:
    release.wait(20)
    return "done"


async def call_with_run_in_executor(call: functools.partial[str]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, call)


async def call_with_to_thread(call: functools.partial[str]) -> None:
    await asyncio.to_thread(call)


@pytest.mark.parametrize("wait", [call_with_run_in_executor, call_with_to_thread])
@pytest.mark.parametrize("seconds", [None, 3600])
def test_virtual_time_error_names_awaited_thread_function(
    wait: object, seconds: float | None
) -> None:
    release = threading.Event()
    assert callable(wait)

    async def wait_for_executor() -> None:
        async with asyncio.timeout(seconds):
            await wait(functools.partial(hash_bytes, release))

    with pytest.raises(
        RuntimeError, match=r"virtual time cannot wait for the thread of hash_bytes\b"
    ):
        run_on_virtual_loop(wait_for_executor())
    release.set()


def test_thread_that_has_finished_causes_no_error_in_virtual_time() -> None:
    async def sleep_after_thread_has_finished() -> None:
        loop = asyncio.get_running_loop()
        returned = asyncio.Event()
        loop.run_in_executor(None, hash_bytes, release).add_done_callback(lambda _: returned.set())
        until = time.monotonic() + 20
        # In virtual time, a wait for the event would be an error, so check it repeatedly.
        while not returned.is_set():
            assert time.monotonic() < until
            await asyncio.sleep(0)
        await asyncio.sleep(3600)

    release = threading.Event()
    release.set()
    run_on_virtual_loop(sleep_after_thread_has_finished())


def test_virtual_time_error_names_awaited_socket() -> None:
    async def wait_for_socket() -> None:
        async with asyncio.timeout(3600):
            await asyncio.get_running_loop().sock_recv(client, 1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(0)
            text = f"virtual time cannot wait for the socket connected to 127.0.0.1:{port}$"
            with pytest.raises(RuntimeError, match=text):
                run_on_virtual_loop(wait_for_socket())


@pytest.mark.parametrize("output", [None, asyncio.subprocess.PIPE])
def test_virtual_time_error_names_awaited_process(output: int | None) -> None:
    async def wait_for_process() -> None:
        process = await asyncio.create_subprocess_exec("sleep", "30", stdout=output)
        try:
            async with asyncio.timeout(3600):
                await process.communicate()
        finally:
            process.kill()
            await process.wait()  # After its RuntimeError, the loop waits in real time.

    with pytest.raises(RuntimeError, match=r"virtual time cannot wait for process \d+ \(sleep\)$"):
        run_on_virtual_loop(wait_for_process())


def test_wait_for_event_that_is_never_set_raises_error_naming_running_threads() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="database", daemon=True)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match=r"no timer is set; .*does not wait .* database"):
            run_on_virtual_loop(asyncio.Event().wait())
    finally:
        release.set()
        thread.join()
