"""The client reads the recorded answers of five other control planes.

Each file of `recorded/` holds the answers of one repository: the call, the file that writes the
answer, the answer itself, and the expected result of the client.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from workpool import Settings, WorkClient
from workpool.errors import ControlPlaneError
from workpool.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

RECORDED = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "recorded").glob("*.json"))
}
ANSWERS = [
    pytest.param(answer, id=f"{name}-{answer['call']}-{number}")
    for name, plane in RECORDED.items()
    for number, answer in enumerate(plane["answers"])
]
WORK_CALLS = ("poll", "ack", "heartbeat", "stop", "update", "list")


def choose_item_id_for_request(answer: dict[str, Any]) -> str:
    """Return the id in the recorded answer, or an arbitrary id if the answer has none."""
    body = answer["body"]
    return str(body["id"]) if isinstance(body, dict) and "id" in body else "work_1"


async def list_items(client: WorkClient) -> list[str]:
    return [item.id async for item in client.list()]


CALLS: dict[str, Callable[[WorkClient, str], Awaitable[Any]]] = {
    "poll": lambda client, _: client.poll(block_ms=1),
    "ack": lambda client, work_id: client.ack(work_id),
    "heartbeat": lambda client, work_id: client.heartbeat(work_id),
    "stop": lambda client, work_id: client.stop(work_id, force=True),
    "update": lambda client, work_id: client.update_metadata(work_id, {"k": "v"}),
    "get": lambda client, work_id: client.get(work_id),
    "list": lambda client, _: list_items(client),
    "stats": lambda client, _: client.stats(),
}


def convert_attribute_to_json(value: object, name: str) -> object:
    """Return an attribute of an object that the client returned, as a JSON value."""
    found = getattr(value, name)
    if isinstance(found, Secret):
        return found.get_secret_value()
    if hasattr(found, "isoformat"):
        return found.isoformat()
    return dict(found) if name == "metadata" else found


@pytest.mark.parametrize("answer", ANSWERS)
async def test_client_parses_each_recorded_response_into_expected_result(
    answer: dict[str, Any],
) -> None:
    async def send_recorded_answer(_: web.Request) -> web.Response:
        headers = answer.get("headers")
        if answer["body"] == "no body":
            return web.Response(status=answer["status"], headers=headers)
        return web.json_response(answer["body"], status=answer["status"], headers=headers)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", send_recorded_answer)
    expected = answer["client"]
    async with TestServer(app, host="127.0.0.1") as server:
        settings = Settings(
            base_url=str(server.make_url("/v1")),
            dialect="anthropic",
            environment_id="env_1",
            token=cast("Any", "token"),
        )
        async with WorkClient(settings) as client:
            call = CALLS[answer["call"]](client, choose_item_id_for_request(answer))
            if "raises" in expected:
                with pytest.raises(ControlPlaneError) as raised:
                    await call
                assert type(raised.value).__name__ == expected["raises"]
                assert raised.value.status == expected["status"]
                assert getattr(raised.value, "error_type", None) == expected["error_type"]
                return
            returned = await call
    if isinstance(expected["returns"], dict):
        found = {name: convert_attribute_to_json(returned, name) for name in expected["returns"]}
        assert found == expected["returns"]
    else:
        assert returned == expected["returns"]


@pytest.mark.parametrize("name", RECORDED)
def test_each_recording_names_a_commit_and_has_an_answer_to_every_worker_call(name: str) -> None:
    plane = RECORDED[name]
    assert plane["repository"].count("/") == 1
    assert len(plane["commit"]) == 40
    assert all("/" in answer["path"] for answer in plane["answers"])
    assert {answer["call"] for answer in plane["answers"]} >= set(WORK_CALLS)
