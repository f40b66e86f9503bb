"""The result of a handler is written completely, or it fails the session."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from workpool.errors import ResultError

if TYPE_CHECKING:
    from workpool import JSON, Session
    from workpool.server import ControlPlane


async def test_result_other_than_mapping_of_strings_is_written_as_json(run_one_item: Any) -> None:
    async def return_json(_: Session) -> JSON:
        return {"rows": 42, "names": ["a", "b"]}

    final = await run_one_item(return_json)
    assert (final.outcome, final.item.state) == ("completed", "stopped")
    assert final.metadata.keys() == {"workpool.result"}
    assert orjson.loads(final.metadata["workpool.result"]) == {"rows": 42, "names": ["a", "b"]}


async def test_result_that_is_not_json_fails_session_and_is_logged(
    run_one_item: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def return_python_set(_: Session) -> Any:
        return {"rows": {1, 2}}

    with caplog.at_level(logging.INFO, "workpool"):
        final = await run_one_item(return_python_set)
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata == {"workpool.error": "ResultError"}
    assert final.request_names.count("ack") == 1
    [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "'workpool.result' cannot be written as JSON" in record.getMessage()
    assert record.exc_info is None


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"rows": "1", "text": "x" * 513}, ("text", 513, 512)),
        ({"k" * 65: "x"}, ("k" * 65, 65, 64)),
        ({f"key{number}": "" for number in range(17)}, ("key16", 17, 16)),
        (["x" * 600], ("workpool.result", 604, 512)),
    ],
    ids=["value", "key", "pairs", "json"],
)
async def test_result_larger_than_anthropic_api_allows_fails_session(
    run_one_item: Any,
    control_plane: ControlPlane,
    caplog: pytest.LogCaptureFixture,
    result: Any,
    expected: Any,
) -> None:
    key, size, limit = expected

    async def return_result(_: Session) -> Any:
        return result

    final = await run_one_item(
        return_result,
        dialect="anthropic",
        base_url=control_plane.anthropic_base_url,
        report_errors="message",
    )
    assert (final.outcome, final.item.state) == ("failed", "stopped")
    assert final.metadata.keys() == {"workpool.error"}
    assert final.metadata["workpool.error"].startswith(f"ResultError: result: '{key}' ")
    error = final.finished.error
    assert isinstance(error, ResultError)
    assert (error.key, error.size, error.limit) == (key, size, limit)
    assert f"'{key}'" in caplog.text
    assert f"{size}; the dialect allows {limit}" in caplog.text


async def test_result_as_large_as_anthropic_api_allows_is_written(
    run_one_item: Any, control_plane: ControlPlane
) -> None:
    result = {f"{number:064}": "☃" * 512 for number in range(16)}

    async def return_result(_: Session) -> dict[str, str]:
        return result

    final = await run_one_item(
        return_result, dialect="anthropic", base_url=control_plane.anthropic_base_url
    )
    assert (final.outcome, final.metadata) == ("completed", result)
