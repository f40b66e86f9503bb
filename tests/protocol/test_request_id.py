"""The header `request-id` of the anthropic dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.protocol.test_events import events_path
from tests.protocol.test_stream import open_stream

if TYPE_CHECKING:
    from tests.protocol.conftest import ApiClient


async def test_anthropic_responses_have_distinct_request_ids(anthropic_api: ApiClient) -> None:
    answers = [
        await anthropic_api.poll(),
        await anthropic_api.poll(),
        await anthropic_api.get("work_unknown"),
        await anthropic_api("GET", anthropic_api.base_url + "/unknown"),
    ]
    assert [answer.status for answer in answers] == [200, 200, 404, 404]
    ids = {answer.headers["request-id"] for answer in answers}
    assert len(ids) == len(answers)
    assert all(each.startswith("req_") for each in ids)


async def test_anthropic_event_stream_has_request_id(anthropic_api: ApiClient) -> None:
    (item,) = anthropic_api.plane.enqueue()
    async with open_stream(anthropic_api, item.session_id) as reader:
        assert reader.response.headers["request-id"].startswith("req_")


async def test_qoder_responses_have_no_request_id(qoder_api: ApiClient) -> None:
    (item,) = qoder_api.plane.enqueue()
    assert "request-id" not in (await qoder_api.poll()).headers
    assert (
        "request-id"
        not in (await qoder_api("GET", events_path(qoder_api, item.session_id))).headers
    )
