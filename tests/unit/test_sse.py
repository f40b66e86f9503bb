"""The parser of event streams, which finds the same frames however the bytes are split."""

from __future__ import annotations

import re
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workpool.wire.events.sse import Frame, FrameParser

if TYPE_CHECKING:
    from collections.abc import Sequence


def parse_chunks_into_frames(*chunks: bytes) -> list[Frame]:
    parser = FrameParser()
    return [frame for chunk in chunks for frame in parser.parse_chunk(chunk)]


def parse_like_html_standard(content: bytes) -> list[Frame]:
    """Parse the bytes of a whole event stream at once, by the steps of the HTML standard."""
    text = content.decode(errors="replace").removeprefix("\ufeff")
    *lines, _ = re.split("\r\n|\r|\n", text)
    frames, event, data, last = [], "", "", ""
    for line in lines:
        if line == "":
            if data:
                frames.append(Frame(event or "message", data[:-1], last))
            event, data = "", ""
            continue
        field, colon, value = line.partition(":")
        if colon and value[:1] == " ":
            value = value[1:]
        if field == "event":
            event = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            last = value
    return frames


@pytest.mark.parametrize(
    ("stream", "frames"),
    [
        (b"", []),
        (b"data: a\n\n", [("message", "a", "")]),
        (b"data: a\n", []),
        (b"data: a", []),
        (b"data:a\ndata:  b\n\n", [("message", "a\n b", "")]),
        (b"data\n\n", [("message", "", "")]),
        (b"event: x\n\ndata: a\n\n", [("message", "a", "")]),
        (b"event: x\nid: 7\ndata: a\n\ndata: b\n\n", [("x", "a", "7"), ("message", "b", "7")]),
        (b"id: 7\n\ndata: a\n\nid\ndata: b\n\n", [("message", "a", "7"), ("message", "b", "")]),
        (b"id: 7\nid: 8\0\ndata: a\n\n", [("message", "a", "7")]),
        (b": keep-alive\n\n:\n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", [("message", "a", "")]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [("message", "a", "")]),
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\r", [("message", x, "") for x in "abc"]),
        (b"retry: 10\ncolour: red\ndata: \xff\xc3\xa9\n\n", [("message", "\ufffdé", "")]),
        (b"data: a\x0bb\x0cc\x1cd\xc2\x85e\xe2\x80\xa8f\n\n",
         [("message", "a\x0bb\x0cc\x1cd\x85e\u2028f", "")]),
    ],
)  # fmt: skip
def test_parser_returns_frames_that_html_standard_prescribes(
    stream: bytes, frames: list[tuple[str, str, str]]
) -> None:
    assert parse_chunks_into_frames(stream) == frames == parse_like_html_standard(stream)
    assert parse_chunks_into_frames(*(bytes((byte,)) for byte in stream)) == frames


pieces = st.sampled_from(
    [b"data", b"event", b"id", b"retry", b":", b": ", b" ", b"\n", b"\r", b"\r\n", b"\n\n",
     b"\0", b"\xef\xbb\xbf", b"\xc3\xa9", b"\xff", b"x", b"\xe2\x80\xa8"]
)  # fmt: skip
streams = st.lists(pieces | st.binary(max_size=4), max_size=40).map(b"".join)


@given(streams, st.lists(st.integers(0, 160), max_size=12))
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 9, 10, 11])
def test_stream_split_into_any_chunks_gives_same_frames(stream: bytes, cuts: Sequence[int]) -> None:
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(places)]
    assert parse_chunks_into_frames(*chunks) == parse_like_html_standard(stream)


def test_parser_returns_frame_as_soon_as_its_last_byte_arrives() -> None:
    parser = FrameParser()
    assert parser.parse_chunk(b"data: a\r\n\r") == [("message", "a", "")]
    assert parser.parse_chunk(b"\ndata: b\n") == []
    assert parser.parse_chunk(b"\n") == [("message", "b", "")]


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_frame_above_limit_is_refused_before_it_is_stored(size: int) -> None:
    line = b"data: " + b"x" * 94
    assert FrameParser(limit=100).parse_chunk(line + b"\n\n")
    for endless in (b"data: " + b"x" * 4096, b": " + b"x" * 4096, b"data: x\n" * 512):
        parser = FrameParser(limit=100)
        chunks = (endless[place : place + size] for place in range(0, len(endless), size))
        with pytest.raises(ValueError, match="too long"):
            deque(map(parser.parse_chunk, chunks), maxlen=0)
        assert len(parser._line) <= 100


def test_long_stream_of_short_frames_is_accepted() -> None:
    parser = FrameParser(limit=20)
    assert sum(len(parser.parse_chunk(b"data: x\n\n: alive\n\n")) for _ in range(1000)) == 1000
