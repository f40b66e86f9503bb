"""The header `request-id` of the anthropic dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.protocol.test_events import path
from tests.protocol.test_stream import stream

if TYPE_CHECKING:
    from tests.protocol.conftest import Api


async def test_anthropic_responses_have_distinct_request_ids(anthropic: Api) -> None:
    answers = [
        await anthropic.poll(),
        await anthropic.poll(),
        await anthropic.get("work_unknown"),
        await anthropic("GET", anthropic.base + "/unknown"),
    ]
    assert [answer.status for answer in answers] == [200, 200, 404, 404]
    ids = {answer.headers["request-id"] for answer in answers}
    assert len(ids) == len(answers)
    assert all(each.startswith("req_") for each in ids)


async def test_anthropic_event_stream_has_request_id(anthropic: Api) -> None:
    (item,) = anthropic.plane.enqueue()
    async with stream(anthropic, item.session_id) as reader:
        assert reader.response.headers["request-id"].startswith("req_")


async def test_qoder_responses_have_no_request_id(qoder: Api) -> None:
    (item,) = qoder.plane.enqueue()
    assert "request-id" not in (await qoder.poll()).headers
    assert "request-id" not in (await qoder("GET", path(qoder, item.session_id))).headers
