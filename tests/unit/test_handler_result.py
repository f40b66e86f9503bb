"""The metadata that a handler's result becomes, and the results that are refused."""

from __future__ import annotations

import enum
import uuid
from collections import UserDict, UserList
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from workpool.errors import ResultError
from workpool.pool.handler_result import make_metadata_from_result
from workpool.wire.client_dialects import MetadataLimits

if TYPE_CHECKING:
    from collections.abc import Mapping

LIMITS = MetadataLimits(pairs=2, key_characters=15, value_characters=4)


class EnumUsedAsKey(enum.StrEnum):
    ROWS = "rows"


@dataclass
class PurchaseResult:
    amount: int


@pytest.mark.parametrize(
    "returned", [{}, {"a": "b"}, {"a": ""}, {"": "b"}, {"ü": "☃"}, MappingProxyType({"a": "b"})]
)
def test_handler_result_with_string_values_becomes_metadata_with_same_keys(
    returned: Mapping[str, str],
) -> None:
    assert make_metadata_from_result(returned, None) == returned


def test_later_change_of_returned_handler_result_does_not_change_metadata() -> None:
    returned = {"a": "b"}
    result = make_metadata_from_result(returned, None)
    returned["a"] = "changed"
    assert result == {"a": "b"}


def test_handler_result_none_writes_no_metadata() -> None:
    assert make_metadata_from_result(None, None) == {}
    assert make_metadata_from_result(None, LIMITS) == {}


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (42, "42"),
        (False, "false"),
        (2.5, "2.5"),
        ("text", '"text"'),
        ("☃", '"☃"'),
        ([], "[]"),
        ([{"a": "b"}, None], '[{"a":"b"},null]'),
        ((1, 2), "[1,2]"),
        ({"a": 1}, '{"a":1}'),
        ({"a": "b", "c": None}, '{"a":"b","c":null}'),
        ({"a": {"b": "c"}}, '{"a":{"b":"c"}}'),
        ({"a": MappingProxyType({"b": UserList([1])})}, '{"a":{"b":[1]}}'),
        (UserDict({"a": 1}), '{"a":1}'),
        (range(2), "[0,1]"),
        # Type checkers reject these results. The pool writes them nevertheless, so that the result
        # of a finished session is not lost.
        ({"at": datetime(2026, 3, 1, tzinfo=UTC)}, '{"at":"2026-03-01T00:00:00+00:00"}'),
        (PurchaseResult(7), '{"amount":7}'),
        (uuid.UUID(int=0), '"00000000-0000-0000-0000-000000000000"'),
        (EnumUsedAsKey.ROWS, '"rows"'),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_handler_result_other_than_strings_is_written_as_compact_json(
    returned: Any, text: str
) -> None:
    assert make_metadata_from_result(returned, None) == {"workpool.result": text}


@pytest.mark.parametrize(
    "returned",
    [b"secret", object(), {1: "secret"}, {"secret"}, {"a": {"secret"}}, 1 << 64, [b"secret"],
     "secret \ud800", memoryview(b"secret")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_error_about_handler_result_that_is_no_json_does_not_quote_result(returned: Any) -> None:
    with pytest.raises(ResultError, match=r"^result: 'workpool\.result' cannot be") as caught:
        make_metadata_from_result(returned, None)
    assert caught.value.key == "workpool.result"
    assert (caught.value.size, caught.value.limit) == (None, None)
    assert "secret" not in str(caught.value)


def test_handler_result_that_contains_itself_raises_result_error() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ResultError):
        make_metadata_from_result(endless, None)


@pytest.mark.parametrize("returned", [{"a": "\ud800"}, {"\udfff": "b"}])
def test_handler_result_with_text_that_utf8_cannot_encode_raises_result_error(
    returned: Mapping[str, str],
) -> None:
    with pytest.raises(ResultError, match="UTF-8 cannot encode"):
        make_metadata_from_result(returned, None)


@pytest.mark.parametrize(
    "returned", [{"a": "1234", "b": "☃☃☃☃"}, {"x" * 15: ""}, "12", 1234, {}, None]
)
def test_handler_result_within_metadata_limits_raises_no_error(returned: Any) -> None:
    make_metadata_from_result(returned, LIMITS)


@pytest.mark.parametrize(
    ("returned", "key", "size", "limit"),
    [
        ({"a": "1", "b": "12345"}, "b", 5, 4),
        ({"a": "1", "x" * 16: "2"}, "x" * 16, 16, 15),
        ({"a": "1", "b": "2", "c": "3"}, "c", 3, 2),
        ("123", "workpool.result", 5, 4),
        ([12, 3], "workpool.result", 6, 4),
    ],
)
def test_error_about_too_large_result_names_metadata_key_and_size(
    returned: Any, key: str, size: int, limit: int
) -> None:
    with pytest.raises(ResultError) as caught:
        make_metadata_from_result(returned, LIMITS)
    error = caught.value
    assert (error.key, error.size, error.limit) == (key, size, limit)
    assert repr(key) in str(error)
    assert f" {size}; the dialect allows {limit}" in str(error)


def test_error_about_result_with_long_key_is_short() -> None:
    with pytest.raises(ResultError) as caught:
        make_metadata_from_result({"x" * 100_000: ""}, LIMITS)
    assert len(str(caught.value)) < 300
    assert len(caught.value.key) == 100_000
