"""Parsing of items, heartbeats and stats: accepted fields, and errors that quote no content."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workpool.wire.items import (
    Heartbeat,
    QueueStats,
    WorkItem,
    parse_heartbeat,
    parse_item,
    parse_stats,
)

Parse = Callable[[object], object]

ITEM: dict[str, Any] = {
    "id": "work_0198f1a0000070008000000000000001",
    "type": "work",
    "environment_id": "env_00000000000070008000000000000001",
    "data": {"type": "session", "id": "sess_0198f1a0000070008000000000000002"},
    "state": "active",
    "created_at": "2026-01-02T03:04:05Z",
    "acknowledged_at": "2026-01-02T03:04:06Z",
    "started_at": "2026-01-02T03:04:07Z",
    "latest_heartbeat_at": "2026-01-02T03:04:08.123456Z",
    "stop_requested_at": None,
    "stopped_at": None,
    "metadata": {"job": "daily-report"},
}
HEARTBEAT: dict[str, Any] = {
    "type": "work_heartbeat",
    "last_heartbeat": "2026-01-02T03:04:08.123456Z",
    "lease_extended": True,
    "state": "active",
    "ttl_seconds": 60,
}
STATS: dict[str, Any] = {
    "type": "work_queue_stats",
    "depth": 3,
    "pending": 1,
    "oldest_queued_at": "2026-01-02T03:04:05Z",
    "workers_polling": 2,
}
HIDDEN = "hunter2-hunter2"

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def copy_without_field(obj: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in obj.items() if key != name}


def test_each_field_of_item_json_is_parsed() -> None:
    assert parse_item(ITEM) == WorkItem(
        id="work_0198f1a0000070008000000000000001",
        type="session",
        session_id="sess_0198f1a0000070008000000000000002",
        environment_id="env_00000000000070008000000000000001",
        state="active",
        metadata={"job": "daily-report"},
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        acknowledged_at=datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC),
        started_at=datetime(2026, 1, 2, 3, 4, 7, tzinfo=UTC),
        latest_heartbeat_at=datetime(2026, 1, 2, 3, 4, 8, 123456, tzinfo=UTC),
        last_heartbeat="2026-01-02T03:04:08.123456Z",
        stop_requested_at=None,
        stopped_at=None,
    )


def test_item_with_unknown_fields_is_parsed_and_secret_is_dropped() -> None:
    item = parse_item({**ITEM, "secret": HIDDEN, "data": {**ITEM["data"], "secret": HIDDEN}})
    assert item == parse_item(ITEM)
    assert HIDDEN not in repr(item)


def test_item_metadata_is_read_only() -> None:
    metadata: Any = parse_item(ITEM).metadata
    with pytest.raises(TypeError):
        metadata["job"] = "other"


@pytest.mark.parametrize("bad", [1, None, True, ["x"], {"a": "b"}])
def test_metadata_entry_other_than_text_is_left_out(bad: object) -> None:
    item = parse_item({**ITEM, "metadata": {"job": "daily-report", "extra": bad}})
    assert item.metadata == {"job": "daily-report"}


@pytest.mark.parametrize("metadata", [None, {}, [], "x", 0])
def test_missing_or_malformed_metadata_is_parsed_as_empty(metadata: object) -> None:
    assert parse_item({**ITEM, "metadata": metadata}).metadata == {}


@pytest.mark.parametrize("state", ["queued", "starting", "active", "stopping", "stopped"])
def test_each_of_the_five_states_is_parsed_in_item_and_heartbeat(state: str) -> None:
    assert parse_item({**ITEM, "state": state}).state == state
    assert parse_heartbeat({**HEARTBEAT, "state": state}).state == state


@pytest.mark.parametrize("kind", ["session", "healthcheck", "something new", ""])
def test_item_of_known_or_unknown_type_is_parsed_with_that_type(kind: str) -> None:
    item = parse_item({**ITEM, "data": {"type": kind, "id": "sess_1"}})
    assert (item.type, item.session_id) == (kind, "sess_1")


def test_item_without_session_id_is_refused_if_its_type_is_session() -> None:
    assert parse_item({**ITEM, "data": {"type": "healthcheck"}}).session_id == ""
    with pytest.raises(ValueError, match=r"data\.id"):
        parse_item({**ITEM, "data": {"type": "session"}})


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05.1Z", datetime(2026, 1, 2, 3, 4, 5, 100000, tzinfo=UTC)),
        ("2026-01-02T03:04:05.123Z", datetime(2026, 1, 2, 3, 4, 5, 123000, tzinfo=UTC)),
        ("2026-01-02T03:04:05.123456789Z", datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)),
        ("2026-01-02T05:04:05+02:00", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02 03:04:05.123456", datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)),
    ],
)
def test_timestamps_of_any_precision_and_offset_are_parsed_as_utc(
    text: str, time: datetime
) -> None:
    parsed = parse_item({**ITEM, "created_at": text}).created_at
    assert parsed == time
    assert parsed is not None
    assert parsed.utcoffset() == timedelta(0)


TIMES = [name for name in ITEM if name.endswith("_at")]


@pytest.mark.parametrize("name", TIMES)
def test_item_with_unreadable_timestamp_keeps_its_other_fields(name: str) -> None:
    for bad in BAD_TIMES:
        item = parse_item({**ITEM, name: bad})
        assert getattr(item, name) is None
        changed: dict[str, Any] = {name: None, "last_heartbeat": item.last_heartbeat}
        assert item == dataclasses.replace(parse_item(ITEM), **changed)


def test_item_without_timestamps_is_parsed() -> None:
    item = parse_item({name: ITEM[name] for name in ITEM if name not in TIMES})
    assert [getattr(item, name) for name in TIMES] == [None] * len(TIMES)
    assert item.last_heartbeat is None


@pytest.mark.parametrize("bad", [0, "", [], "1" * 65])
def test_latest_heartbeat_field_with_invalid_type_or_length_is_parsed_as_none(bad: object) -> None:
    assert parse_item({**ITEM, "latest_heartbeat_at": bad}).last_heartbeat is None


def test_latest_heartbeat_field_with_opaque_text_is_kept_unchanged() -> None:
    item = parse_item({**ITEM, "latest_heartbeat_at": "opaque-7"})
    assert (item.latest_heartbeat_at, item.last_heartbeat) == (None, "opaque-7")


def test_queue_stats_with_unreadable_timestamp_are_parsed() -> None:
    for bad in BAD_TIMES:
        assert parse_stats({**STATS, "oldest_queued_at": bad}) == dataclasses.replace(
            parse_stats(STATS), oldest_queued_at=None
        )


def test_timestamp_of_last_heartbeat_is_kept_as_unchanged_text() -> None:
    text = "2026-01-02T05:04:05.100000000+02:00"
    assert parse_item({**ITEM, "latest_heartbeat_at": text}).last_heartbeat == text
    assert parse_heartbeat({**HEARTBEAT, "last_heartbeat": text}).last_heartbeat == text


def test_empty_last_heartbeat_is_parsed_as_no_heartbeat() -> None:
    assert parse_heartbeat({**HEARTBEAT, "last_heartbeat": ""}).last_heartbeat == "NO_HEARTBEAT"


BAD_IDS = (None, 7, "", "a b", "../x", "a/b", "a\n", "ä", "x" * 129, ["a"])
BAD_STATES: tuple[object, ...] = (None, 1, [], {}, "Active", "cancelled")
BAD_TIMES: tuple[object, ...] = (
    0,
    "",
    "now",
    [],
    "yesterday",
    "0001-01-01T00:00:00+14:00",
    "2026-01-02T03:04:05." + "1" * 99 + "Z",
)
LOST_HEARTBEAT = {**HEARTBEAT, "lease_extended": False, "last_heartbeat": None}
BAD_COUNTS = (None, -1, 1.5, True)
BAD_FIELDS: list[tuple[Parse, dict[str, Any], str, tuple[object, ...]]] = [
    (parse_item, ITEM, "id", BAD_IDS),
    (parse_item, ITEM, "environment_id", BAD_IDS),
    (parse_item, ITEM, "data", (None, [], "x", {}, {"type": 1, "id": "a"})),
    (parse_item, ITEM, "data", tuple({"type": "session", "id": bad} for bad in BAD_IDS)),
    (parse_item, ITEM, "data", tuple({"type": "healthcheck", "id": bad} for bad in BAD_IDS[1:])),
    (parse_item, ITEM, "state", BAD_STATES),
    (parse_heartbeat, HEARTBEAT, "state", BAD_STATES),
    (parse_heartbeat, HEARTBEAT, "last_heartbeat", (None, 1, "1" * 65)),
    (parse_heartbeat, LOST_HEARTBEAT, "last_heartbeat", (1, "1" * 65)),
    (parse_heartbeat, LOST_HEARTBEAT, "ttl_seconds", (-1, "60", {}, math.inf)),
    (parse_heartbeat, HEARTBEAT, "lease_extended", (None, 1, "true")),
    (parse_heartbeat, HEARTBEAT, "ttl_seconds", (None, 0, -1, True, "60", math.inf, math.nan)),
    (parse_stats, STATS, "depth", BAD_COUNTS),
    (parse_stats, STATS, "pending", BAD_COUNTS),
    (parse_stats, STATS, "workers_polling", BAD_COUNTS[1:]),
]


@pytest.mark.parametrize(
    ("parse", "obj", "name", "bad"),
    [(parse, obj, name, bad) for parse, obj, name, bads in BAD_FIELDS for bad in bads],
)
def test_error_about_malformed_response_field_names_that_field(
    parse: Parse, obj: dict[str, Any], name: str, bad: object
) -> None:
    with pytest.raises(ValueError, match=name):
        parse({**obj, name: bad})


@pytest.mark.parametrize("parse", [parse_item, parse_heartbeat, parse_stats])
@pytest.mark.parametrize("bad", [None, [], "x", 1, True])
def test_response_that_is_no_object_is_refused(parse: Parse, bad: object) -> None:
    with pytest.raises(ValueError, match="not an object"):
        parse(bad)


@pytest.mark.parametrize("name", ["id", "environment_id", "data", "state"])
def test_error_about_missing_item_field_names_that_field(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        parse_item(copy_without_field(ITEM, name))


def test_each_field_of_queue_stats_json_is_parsed() -> None:
    assert parse_stats(STATS) == QueueStats(
        depth=3,
        pending=1,
        oldest_queued_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        workers_polling=2,
    )
    quiet = parse_stats({"depth": 0, "pending": 0, "oldest_queued_at": None})
    assert quiet == QueueStats(0, 0, None, 0)


def test_each_field_of_heartbeat_json_is_parsed() -> None:
    assert parse_heartbeat({**HEARTBEAT, "ttl_seconds": 12.5}) == Heartbeat(
        "2026-01-02T03:04:08.123456Z", lease_extended=True, state="active", ttl_seconds=12.5
    )


@pytest.mark.parametrize("ttl", [None, 0, 60])
@pytest.mark.parametrize("state", ["queued", "active", "stopping", "stopped"])
def test_heartbeat_answer_without_lease_extension_may_omit_last_heartbeat_and_ttl(
    state: str, ttl: int | None
) -> None:
    lost = {"lease_extended": False, "last_heartbeat": None, "ttl_seconds": ttl, "state": state}
    heartbeat = parse_heartbeat({**HEARTBEAT, **lost})
    assert (heartbeat.last_heartbeat, heartbeat.ttl_seconds) == ("", ttl or 0)


def test_heartbeat_answer_for_stopped_item_may_have_null_last_heartbeat_field() -> None:
    stopped = {"state": "stopped", "last_heartbeat": None, "ttl_seconds": 0}
    assert parse_heartbeat({**HEARTBEAT, **stopped}).last_heartbeat == ""


def parse_and_return_error(parse: Parse, obj: object) -> ValueError | None:
    try:
        parse(obj)
    except ValueError as error:
        return error
    return None


@given(st.sampled_from(sorted(ITEM)), anything)
def test_item_with_arbitrary_field_value_is_parsed_or_raises_value_error(
    name: str, value: object
) -> None:
    error = parse_and_return_error(parse_item, {**ITEM, name: value})
    if error is not None:
        assert error.__context__ is None
        return
    item = parse_item({**ITEM, name: value})
    times = [getattr(item, f.name) for f in dataclasses.fields(item) if f.name.endswith("_at")]
    assert all(time is None or time.utcoffset() == timedelta(0) for time in times)


@given(anything)
def test_arbitrary_json_is_parsed_or_raises_value_error(value: object) -> None:
    for parse in (parse_item, parse_heartbeat, parse_stats):
        parse_and_return_error(parse, value)
        parse_and_return_error(
            parse, {**ITEM, **HEARTBEAT, **STATS, "data": value, "ttl_seconds": value}
        )


@given(st.datetimes(timezones=st.just(UTC)), st.sampled_from([0, 3, 6]))
def test_every_timestamp_format_of_protocol_is_parsed(time: datetime, digits: int) -> None:
    spec = {0: "seconds", 3: "milliseconds", 6: "microseconds"}[digits]
    text = time.isoformat(timespec=spec).replace("+00:00", "Z")
    parsed = parse_item(orjson.loads(orjson.dumps({**ITEM, "created_at": text}))).created_at
    assert parsed is not None
    assert abs(parsed - time) < timedelta(seconds=10.0**-digits)


@pytest.mark.parametrize("name", ["id", "environment_id", "data", "state"])
@pytest.mark.parametrize("bad", [HIDDEN + "/", {"x": [HIDDEN]}, [HIDDEN]])
def test_parse_errors_do_not_quote_the_malformed_value(name: str, bad: object) -> None:
    error = parse_and_return_error(parse_item, {**ITEM, name: bad})
    assert error is not None
    assert HIDDEN not in repr(error)
