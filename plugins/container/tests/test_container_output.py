"""Tests of a container's output log: whole lines, limits, and escaped control characters."""

from __future__ import annotations

import logging

import pytest

from workpool_container.output_log import MAX_LINE_BYTES, OutputLog


def logged_messages(caplog: pytest.LogCaptureFixture, *chunks: bytes, limit: int = 10) -> list[str]:
    caplog.set_level("INFO")
    output = OutputLog(
        logging.LoggerAdapter(logging.getLogger("a.session"), {}), limit, lambda: None
    )
    for chunk in chunks:
        output.add_chunk("stdout", chunk)
    output.log_unfinished_lines()
    return caplog.messages


def test_output_split_into_any_chunks_is_logged_as_whole_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    chunks = (b"on", b"e\ntwo\r\n\nth", b"r\xc3", b"\xa9e")
    assert logged_messages(caplog, *chunks) == [
        "stdout: one",
        "stdout: two",
        "stdout: ",
        "stdout: thrée",
    ]


def test_lines_of_stdout_and_stderr_are_logged_with_stream_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    output = OutputLog(logging.LoggerAdapter(logging.getLogger("a.session"), {}), 10, lambda: None)
    output.add_chunk("stdout", b"out")
    output.add_chunk("stderr", b"err\n")
    output.log_unfinished_lines()
    assert caplog.messages == ["stderr: err", "stdout: out"]


def test_control_characters_in_output_line_are_escaped(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = logged_messages(caplog, b"a\x1b[2Jb\rc\td\xff\xe2\x80\xa8e\n")
    assert line == "stdout: a\\x1b[2Jb\\rc\td\\xff\\u2028e"


def test_long_output_line_is_cut_at_limit_and_next_line_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (line, after) = logged_messages(caplog, *[b"x" * 1000] * 1000, b"\nafter\n")
    assert line == "stdout: " + "x" * MAX_LINE_BYTES + " … (cut)"
    assert after == "stdout: after"


@pytest.mark.parametrize("limit", [0, 2])
def test_container_output_lines_beyond_count_limit_are_not_logged(
    caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    lines = logged_messages(caplog, b"1\n2\n3\n4\n5", limit=limit)
    stdout_lines = [line for line in lines if line.startswith("stdout")]
    assert stdout_lines == [f"stdout: {number}" for number in range(1, limit + 1)]


def test_output_line_that_is_not_logged_because_of_limit_counts_as_progress() -> None:
    progress: list[None] = []
    log = logging.LoggerAdapter(logging.getLogger("a.session"), {})
    output = OutputLog(log, 1, lambda: progress.append(None))
    for chunk in (b"one\n", b"tw", b"o\nthree\n"):
        output.add_chunk("stdout", chunk)
    assert len(progress) == 2
