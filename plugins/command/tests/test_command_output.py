"""Tests of a command's output in the log: lines of any length and encoding, up to a limit."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from workpool.events import SessionFinished
from workpool_command.command_output import LineSplitter, escape_line
from workpool_command.command_result import MAX_RESULT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from workpool.testing import Kit
    from workpool_command import Command

    Shell = Callable[..., Command]


async def test_lines_of_both_streams_are_logged_with_session_id(
    kit: Kit, shell_command: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    script = r"printf 'one\r\n\377\033[31m\ntwo'; printf 'three\n' >&2"
    result = await kit.run_session(shell_command(script))

    records = [record for record in caplog.records if record.name == "workpool.session"]
    assert sorted(record.getMessage() for record in records) == [
        "stderr: three",
        "stdout: \\xff\\x1b[31m",
        "stdout: one",
        "stdout: two",
    ]
    assert {vars(record)["session_id"] for record in records} == {result.item.session_id}


async def test_command_with_much_output_completes_and_log_is_limited(
    kit: Kit, shell_command: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    script = """yes | head -c 2000000; head -c 2000000 /dev/zero; echo; echo '{"bytes": "4 MB"}'"""
    result = await kit.run_session(shell_command(script, log_lines=3, result=True))

    assert (result.outcome, result.metadata["bytes"]) == ("completed", "4 MB")
    logged = [r.getMessage() for r in caplog.records if r.name == "workpool.session"]
    assert logged == ["stdout: y"] * 3 + ["lines not logged: 999999"]


async def test_other_sessions_complete_while_one_command_prints_endlessly(
    kit: Kit, shell_command: Shell
) -> None:
    [chatty] = kit.enqueue(metadata={"kind": "chatty"})
    async with kit.pool(shell_command("case $(cat) in *chatty*) exec yes;; esac", log_lines=0)):
        kit.enqueue(20)
        await kit.wait_for(SessionFinished, count=20)
        kit.stop(chatty)
        last = await kit.wait_for(SessionFinished, count=21)

    assert (last.session.item.id, last.outcome) == (chatty.id, "stopped")


def test_line_splitter_uses_limited_memory_for_endless_line() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = LineSplitter(lambda _: None)
    for _ in range(3_000):
        lines.add_chunk(b"\0" * 65_536)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@settings(deadline=None)
@given(st.lists(st.binary(max_size=9) | st.just(b"\n") | st.just(b" ")))
def test_line_splitter_finds_same_lines_however_stream_is_divided_into_chunks(
    chunks: list[bytes],
) -> None:
    fed_lines: list[bytes] = []
    lines = LineSplitter(lambda some: fed_lines.extend(some.split(b"\n")))
    for chunk in chunks:
        lines.add_chunk(chunk)
    lines.flush_unfinished_line()

    whole = b"".join(chunks).split(b"\n")
    assert fed_lines == (whole if whole[-1] else whole[:-1])
    assert lines.last == next((line.rstrip() for line in reversed(fed_lines) if line.strip()), b"")


@settings(deadline=None)
@given(st.binary())
def test_bytes_of_any_line_are_logged_as_one_printable_line(line: bytes) -> None:
    assert escape_line(line).isprintable()


def test_long_line_is_cut_in_result_and_log() -> None:
    lines = LineSplitter(lambda _: None)
    lines.add_chunk(b"x" * 70_000 + b"\n")
    assert len(lines.last) == MAX_RESULT_BYTES + 1
    assert escape_line(lines.last).endswith("xxx … (cut)")
    assert len(escape_line(lines.last)) < 2_100
