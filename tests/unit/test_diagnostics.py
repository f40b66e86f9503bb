"""Diagnostic reports with a time limit, and thread stacks collected without a temporary file."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest

from workpool.pool import diagnostics
from workpool.pool.diagnostics import (
    THREADS_MAX,
    format_stack_of_task,
    format_stacks_of_all_threads,
    log_on_new_thread,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def start_threads_joined_after_test() -> Iterator[
    Callable[[int, Callable[[], object]], list[threading.Thread]]
]:
    """Return a function that starts threads, which end once `release` is set."""
    threads: list[threading.Thread] = []

    def start_threads(count: int, call: Callable[[], object]) -> list[threading.Thread]:
        threads.extend(threading.Thread(target=call) for _ in range(count))
        for thread in threads:
            thread.start()
        return threads

    yield start_threads
    for thread in threads:
        thread.join()


def test_error_in_diagnostic_report_on_thread_is_raised_in_caller() -> None:
    def raise_while_writing_report() -> None:
        raise SystemExit("from a log handler")

    with pytest.raises(SystemExit, match="from a log handler"):
        log_on_new_thread(raise_while_writing_report)


def test_diagnostic_report_that_hangs_returns_after_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnostics, "REPORT_SECONDS", 0.05)
    began, release, ended = threading.Event(), threading.Event(), threading.Event()

    def hang_while_writing_report() -> None:
        began.set()
        release.wait()
        ended.set()

    log_on_new_thread(hang_while_writing_report)
    assert began.wait(20)
    assert not ended.is_set()
    release.set()
    assert ended.wait(20)


def test_thread_stacks_are_returned_without_a_temporary_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: iter(()))
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    text = format_stacks_of_all_threads(threading.get_ident())
    assert text.startswith("Thread MainThread")
    assert "in test_thread_stacks_are_returned_without_a_temporary_directory" in text


def test_stack_report_of_many_threads_is_limited_and_begins_with_requested_thread(
    start_threads_joined_after_test: Callable[[int, Callable[[], object]], list[threading.Thread]],
) -> None:
    count = THREADS_MAX + 5
    all_deep, release = threading.Barrier(count + 1), threading.Event()

    def recurse_deeply(depth: int = 300) -> None:
        if depth:
            return recurse_deeply(depth - 1)
        all_deep.wait(20)
        release.wait()
        return None

    threads = start_threads_joined_after_test(count, recurse_deeply)
    try:
        all_deep.wait(20)
        first = threads[-1]
        assert first.ident is not None
        text = format_stacks_of_all_threads(first.ident)
    finally:
        release.set()
    assert text.startswith(f"Thread {first.name} ")
    assert text.count("most recent call last") == THREADS_MAX
    assert "more threads" in text
    assert len(text) < 130_000


async def test_stack_of_task_has_one_frame_for_each_awaited_coroutine() -> None:
    released = asyncio.Event()

    async def wait_for_release_event() -> None:
        await released.wait()

    async def await_inner_coroutine() -> None:
        await wait_for_release_event()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(await_inner_coroutine(), name="waiting")
        await asyncio.sleep(0)
        lines = format_stack_of_task(task).splitlines()
        released.set()
    assert lines[0] == "Task waiting (most recent call last):"
    functions = [line.rpartition(" in ")[2] for line in lines if line.startswith("  File ")]
    assert functions == ["await_inner_coroutine", "wait_for_release_event", "wait"]
    assert format_stack_of_task(task) == "Task waiting (most recent call last):\n"
