"""The finish table of design §1, against a literal copy, and what it writes."""

from __future__ import annotations

from itertools import combinations
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from workpool.pool.claim import Cause
from workpool.pool.finish import NOTE_LIMIT, TABLE, mapping_of, sendable

if TYPE_CHECKING:
    from collections.abc import Mapping

# A literal copy, in the order of the design: the lowest that applies wins.
DESIGN = [
    ("RETURNED", "stop", "mapping", "completed"),
    ("RAISED", "stop", "error", "failed"),
    ("TIMED_OUT", "stop", "error", "timed_out"),
    ("DRAINED", "release", "reason", "released"),
    ("RELEASED", "release", "reason", "released"),
    ("STOP_REQUESTED", "stop", "mapping", "stopped"),
    ("DETACHED", "untouched", "none", "detached"),
    ("STOPPED", "untouched", "none", "stopped"),
    ("LOST", "untouched", "none", "lease_lost"),
]


def test_the_table_is_the_designs() -> None:
    assert [
        (cause.name, row.item, row.metadata, row.outcome) for cause, row in TABLE.items()
    ] == DESIGN


@pytest.mark.parametrize("pair", list(combinations([row[0] for row in DESIGN], 2)))
def test_of_two_causes_the_lower_row_wins(pair: tuple[str, str]) -> None:
    upper, lower = pair
    assert max({Cause[upper], Cause[lower]}) is Cause[lower]


@pytest.mark.parametrize(
    "returned", [{}, {"a": "b"}, {"a": ""}, {"": "b"}, {"ü": "☃"}, MappingProxyType({"a": "b"})]
)
def test_a_mapping_of_strings_is_a_result(returned: Mapping[str, str]) -> None:
    assert mapping_of(returned) == returned


def test_none_is_an_empty_result() -> None:
    assert mapping_of(None) == {}


@pytest.mark.parametrize(
    "returned",
    [0, 1, False, "text", b"", [], [("a", "b")], object(), {"a": 1}, {"a": None}, {1: "b"},
     {None: "b"}, {"a": {"b": "c"}}, {"a": b"b"}],
)  # fmt: skip
def test_anything_else_is_not(returned: Any) -> None:
    with pytest.raises(TypeError, match="a handler returns"):
        mapping_of(returned)


@pytest.mark.parametrize("returned", [{"a": "\ud800"}, {"\udfff": "b"}])
def test_what_utf8_cannot_carry_is_not_either(returned: Mapping[str, str]) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        mapping_of(returned)


def test_the_type_is_quoted_and_the_content_is_not() -> None:
    with pytest.raises(TypeError) as caught:
        mapping_of({"token": b"secret"})
    assert "bytes" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("", ""),
        ("short", "short"),
        ("x" * 512, "x" * 512),
        ("x" * 513, "x" * 512),
        ("☃" * 600, "☃" * 512),
        ("a\ud800b", "a?b"),
    ],
)
def test_a_note_is_cut_and_can_be_sent(text: str, note: str) -> None:
    assert NOTE_LIMIT == 512
    assert sendable(text) == note
