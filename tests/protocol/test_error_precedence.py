"""Precedence of errors when several apply, and the body of each error.

See workpool/docs/protocol.md, "Errors".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.protocol.conftest import CLOUD, ENV, LIMITED, OTHER, TOKEN

if TYPE_CHECKING:
    from tests.protocol.conftest import ApiClient

UNKNOWN_ENV = "env_0199aaaaaaaa7000800000000000dead"
UNKNOWN_ITEM = "work_0199aaaaaaaa7000800000000000dead"

CALLS = {
    "poll": ("GET", "/poll"),
    "ack": ("POST", "/{id}/ack"),
    "heartbeat": ("POST", "/{id}/heartbeat"),
    "stop": ("POST", "/{id}/stop"),
    "update": ("POST", "/{id}"),
    "get": ("GET", "/{id}"),
    "list": ("GET", ""),
    "stats": ("GET", "/stats"),
    "enqueue": ("POST", ""),
}
ON_ITEMS = ["ack", "heartbeat", "stop", "update", "get"]
BAD_REQUEST = {
    "params": {
        "block_ms": "0",
        "desired_ttl_seconds": "0",
        "expected_last_heartbeat": "x",
        "limit": "0",
    },
    "data": b"{",
}
"""The options of a request with every mistake that it can contain."""


@pytest.mark.parametrize("call", CALLS)
async def test_request_with_several_errors_is_answered_with_status_of_highest_precedence(
    api: ApiClient, call: str
) -> None:
    method, suffix = CALLS[call]

    async def send_bad_request_and_get_status(token: str | None, environment: str) -> int:
        api.token = token
        url = api.work_url(suffix.format(id=UNKNOWN_ITEM), environment)
        answer = await api(method, url, **BAD_REQUEST)
        assert answer.error["type"]
        return answer.status

    assert await send_bad_request_and_get_status(None, UNKNOWN_ENV) == 401
    assert await send_bad_request_and_get_status("wrong", CLOUD) == 401
    assert await send_bad_request_and_get_status(LIMITED, UNKNOWN_ENV) == 403
    assert await send_bad_request_and_get_status(LIMITED, OTHER) == 403
    assert await send_bad_request_and_get_status(LIMITED, CLOUD) == 403
    assert await send_bad_request_and_get_status(TOKEN, UNKNOWN_ENV) == 404
    assert await send_bad_request_and_get_status(TOKEN, CLOUD) == 400
    expected = {"get": 404, "stats": 200}.get(call, 404 if call in ON_ITEMS else 400)
    if expected != 200:
        assert await send_bad_request_and_get_status(TOKEN, ENV) == expected
        assert await send_bad_request_and_get_status(LIMITED, ENV) == expected


@pytest.mark.parametrize("call", ["ack", "heartbeat", "stop", "update"])
async def test_bad_request_to_stopped_item_is_400_rather_than_409(
    api: ApiClient, call: str
) -> None:
    work_id = await api.create_item_in_state("stopped")
    method, suffix = CALLS[call]
    answer = await api(method, api.work_url(suffix.format(id=work_id)), **BAD_REQUEST)
    # An ack has no parameters that could be bad, so its only error is the 409 for the stopped item.
    assert answer.status == (409 if call == "ack" else 400)


async def test_heartbeat_with_wrong_time_on_stopped_item_is_409_rather_than_412(
    qoder_api: ApiClient,
) -> None:
    work_id = await qoder_api.create_item_in_state("stopped")
    assert (await qoder_api.heartbeat(work_id, "2026-03-01T12:00:00Z")).status == 409


@pytest.mark.parametrize("call", CALLS)
async def test_worker_call_to_environment_that_is_not_self_hosted_is_400(
    api: ApiClient, call: str
) -> None:
    method, suffix = CALLS[call]
    answer = await api(method, api.work_url(suffix.format(id=UNKNOWN_ITEM), CLOUD))
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN} x",
        "Bearer \u00ff",
        f"Bearer {TOKEN.upper()}",
    ],
)
async def test_missing_or_wrong_token_is_401(api: ApiClient, authorization: str | None) -> None:
    api.token = None
    headers = {} if authorization is None else {"Authorization": authorization}
    answer = await api("GET", api.work_url("/poll"), headers=headers)
    assert answer.status == 401
    assert answer.error["type"] == "authentication_error"
    assert TOKEN not in str(answer.body)


async def test_authorization_scheme_is_case_insensitive(api: ApiClient) -> None:
    api.token = None
    answer = await api("GET", api.work_url("/poll"), headers={"Authorization": f"bearer {TOKEN}"})
    assert answer.status == 200


async def test_token_without_permission_is_403(api: ApiClient) -> None:
    api.token = LIMITED
    assert (await api.poll(ENV)).status == 200
    answer = await api.poll(OTHER)
    assert answer.status == 403
    assert answer.error["type"] == "permission_error"


@pytest.mark.parametrize(
    "path",
    ["", "/", "/environment", f"/environments/{ENV}/x", f"/environments/{ENV}/work/", "/work"],
)
async def test_unknown_path_is_404_with_error_body(api: ApiClient, path: str) -> None:
    answer = await api("GET", api.base_url + path)
    assert answer.status == 404
    assert answer.error["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "suffix", "allowed"),
    [
        ("POST", "/poll", "GET"),
        ("POST", "/stats", "GET"),
        ("PUT", "", "GET,POST"),
        ("DELETE", "/work_1", "GET,POST"),
        ("PATCH", "/work_1", "GET,POST"),
        ("GET", "/work_1/ack", "POST"),
        ("GET", "/work_1/heartbeat", "POST"),
        ("PUT", "/work_1/stop", "POST"),
        ("OPTIONS", "/poll", "GET"),
    ],
)
async def test_wrong_method_is_405_with_error_body(
    api: ApiClient, method: str, suffix: str, allowed: str
) -> None:
    answer = await api(method, api.work_url(suffix))
    assert answer.status == 405
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["Allow"] == allowed


async def test_each_dialect_answers_only_under_its_own_prefix(qoder_api: ApiClient) -> None:
    origin = qoder_api.base_url.removesuffix("/api/v1/cloud")
    for prefix, status in {"/api/v1/cloud": 200, "/v1": 200, "": 404, "/api/v1": 404}.items():
        url = f"{origin}{prefix}/environments/{ENV}/work/poll"
        assert (await qoder_api("GET", url)).status == status


async def test_worker_id_header_of_other_dialect_is_ignored(
    qoder_api: ApiClient, anthropic_api: ApiClient
) -> None:
    qoder_api.plane.enqueue(2)
    item = await anthropic_api.claim_item(headers={"Worker-ID": "not-read-here"}, worker="a")
    assert (await qoder_api.ack(item["id"], worker="b")).status == 409
    item = await qoder_api.claim_item(headers={"anthropic-worker-id": "not-read-here"})
    assert (await qoder_api.ack(item["id"], worker="b")).status == 200
