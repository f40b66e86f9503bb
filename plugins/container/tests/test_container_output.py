"""The output of containers in the log: limited, and without control characters."""

from __future__ import annotations

import logging

import pytest

from workpool_container.output import LINE_BYTES, Output


def logged(caplog: pytest.LogCaptureFixture, *pieces: bytes, limit: int = 10) -> list[str]:
    caplog.set_level("INFO")
    output = Output(logging.LoggerAdapter(logging.getLogger("a.session"), {}), limit, lambda: None)
    for piece in pieces:
        output.add("stdout", piece)
    output.close()
    return caplog.messages


def test_output_in_any_pieces_is_logged_as_whole_lines(caplog: pytest.LogCaptureFixture) -> None:
    pieces = (b"on", b"e\ntwo\r\n\nth", b"r\xc3", b"\xa9e")
    assert logged(caplog, *pieces) == ["stdout: one", "stdout: two", "stdout: ", "stdout: thrée"]


def test_lines_of_stdout_and_stderr_are_logged_with_stream_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    output = Output(logging.LoggerAdapter(logging.getLogger("a.session"), {}), 10, lambda: None)
    output.add("stdout", b"out")
    output.add("stderr", b"err\n")
    output.close()
    assert caplog.messages == ["stderr: err", "stdout: out"]


def test_control_characters_in_output_line_are_escaped(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = logged(caplog, b"a\x1b[2Jb\rc\td\xff\xe2\x80\xa8e\n")
    assert line == "stdout: a\\x1b[2Jb\\rc\td\\xff\\u2028e"


def test_long_output_line_is_cut_and_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    (line, after) = logged(caplog, *[b"x" * 1000] * 1000, b"\nafter\n")
    assert line == "stdout: " + "x" * LINE_BYTES + " … (cut)"
    assert after == "stdout: after"


@pytest.mark.parametrize("limit", [0, 2])
def test_output_lines_beyond_limit_are_not_logged(
    caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    lines = logged(caplog, b"1\n2\n3\n4\n5", limit=limit)
    stdout_lines = [line for line in lines if line.startswith("stdout")]
    assert stdout_lines == [f"stdout: {number}" for number in range(1, limit + 1)]


def test_lines_are_progress_also_beyond_limit() -> None:
    progress: list[None] = []
    log = logging.LoggerAdapter(logging.getLogger("a.session"), {})
    output = Output(log, 1, lambda: progress.append(None))
    for piece in (b"one\n", b"tw", b"o\nthree\n"):
        output.add("stdout", piece)
    assert len(progress) == 2
