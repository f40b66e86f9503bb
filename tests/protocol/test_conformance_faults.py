"""Every clause of the conformance suite can fail: each one detects a wrong control plane.

A wrong control plane is the embedded one with a fault in front of it, or with a clock that
runs faster or slower than the suite's.
"""

from __future__ import annotations

import json
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from aiohttp import web

from tests.protocol.conftest import ENV, START, TOKEN, Clock
from tests.protocol.test_conformance import suite_of
from workpool.conformance import CLAUSES, Clause, Verdict
from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp

    from workpool.wire.protocol import Dialect

FOUND = {Verdict.DIFFERS, Verdict.BREAKS}


class Wrong(NamedTuple):
    """One wrong control plane.

    Attributes:
        clauses: The clauses that detect it.
        fault: A middleware; None = none.
        speed: Seconds of the control plane's clock for one of the suite's.
        dialect: The dialect of the suite.
        mixed: Whether the control plane uses the other dialect.
    """

    clauses: str
    fault: Any = None
    speed: float = 1.0
    dialect: Dialect = "qoder"
    mixed: bool = False


def on(path: str, change: Callable[[web.Request], web.Response | None]) -> Any:
    """Return a fault that replaces answers of requests whose path ends so."""

    @web.middleware
    async def fault(request: web.Request, handler: Any) -> web.StreamResponse:
        changed = change(request) if request.path.endswith(path) else None
        response: web.StreamResponse = changed or await handler(request)
        return response

    return fault


def after(path: str, change: Callable[[Any], Any]) -> Any:
    """Return a fault that changes the JSON of successful answers of requests whose path ends so."""

    @web.middleware
    async def fault(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.Response = await handler(request)
        if not request.path.endswith(path) or response.status != 200:
            return response
        value = json.loads(response.text or "null")
        return web.json_response(change(value) if isinstance(value, dict) else value)

    return fault


def on_errors(answer: Callable[[int], web.Response]) -> Any:
    """Return a fault that replaces error answers."""

    @web.middleware
    async def fault(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.Response = await handler(request)
        return answer(response.status) if response.status >= 400 else response

    return fault


def query(path: str, **values: str | None) -> Any:
    """Return a fault that changes query parameters of some requests; None removes the parameter."""

    @web.middleware
    async def fault(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.endswith(path):
            merged = {**request.query, **values}
            kept = {name: value for name, value in merged.items() if value is not None}
            request = request.clone(rel_url=request.rel_url.with_query(kept))
        response: web.StreamResponse = await handler(request)
        return response

    return fault


def newest_first_once() -> Any:
    swapped = False

    @web.middleware
    async def fault(request: web.Request, handler: Any) -> web.StreamResponse:
        nonlocal swapped
        response: web.Response = await handler(request)
        if not request.path.endswith("/poll") or swapped or response.body == b"null":
            return response
        swapped = True
        return cast("web.Response", await handler(request))

    return fault


def new_id_for_a_redelivery() -> Any:
    known: set[str] = set()

    def change(item: dict[str, Any]) -> dict[str, Any]:
        again = item["id"] in known
        known.add(item["id"])
        return {**item, "id": f"{item['id']}-again"} if again else item

    return after("/poll", change)


def stopped_items_come_again() -> Any:
    polled: list[web.Response] = []

    @web.middleware
    async def fault(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.Response = await handler(request)
        if not request.path.endswith("/poll"):
            return response
        if response.body != b"null":
            polled.append(response)
            return response
        return web.Response(body=polled[-1].body, content_type="application/json")

    return fault


def first_heartbeats_count_once() -> Any:
    begun: set[str] = set()

    def change(request: web.Request) -> web.Response | None:
        if request.query.get("expected_last_heartbeat") != "NO_HEARTBEAT":
            return None
        again = request.path in begun
        begun.add(request.path)
        return web.Response(status=412) if again else None

    return on("/heartbeat", change)


def refused(request: web.Request) -> web.Response | None:
    path = request.path.partition("/work")[2]
    item = path.startswith("/work_") and path.count("/") == 1
    return web.Response(status=403) if item or path == "/stats" else None


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    return {name: None if name.endswith("_at") else each for name, each in value.items()}


def wrongs() -> list[Wrong]:
    acked = count(10)
    empty = web.json_response
    return [
        Wrong(
            "auth-missing auth-wrong environment-unknown heartbeat-queued heartbeat-stopped"
            " ack-other-worker ack-stopped ack-unknown result-once result-unknown",
            on_errors(lambda _: web.json_response({})),
        ),
        Wrong("error-envelope", on_errors(lambda status: web.Response(status=status))),
        Wrong("poll-delivers", after("/poll", lambda item: {**item, "state": "starting"})),
        Wrong("poll-once", query("/poll", reclaim_older_than_ms="0")),
        Wrong("poll-redelivers poll-reclaim", query("/poll", reclaim_older_than_ms="99999999")),
        Wrong("poll-blocks poll-block-range", query("/poll", block_ms=None)),
        Wrong("poll-empty", on("/poll", lambda _: web.Response(status=204))),
        Wrong(
            "poll-item",
            after("/poll", lambda item: {k: v for k, v in item.items() if k != "metadata"}),
        ),
        Wrong("poll-oldest-first", newest_first_once()),
        Wrong("ack-starts", after("/ack", lambda item: {**item, "state": "active"})),
        Wrong("ack-repeat", after("/ack", lambda it: {**it, "acknowledged_at": str(next(acked))})),
        Wrong("ack-lease lease-held lease-lapses", speed=3),
        Wrong("poll-reclaim-lease", speed=60),
        Wrong("lease-stopping", speed=0.01),
        Wrong("lease-shortened heartbeat-ttl", query("/heartbeat", desired_ttl_seconds="600")),
        Wrong("heartbeat-ttl-zero", query("/heartbeat", desired_ttl_seconds=None)),
        Wrong("lease-first-heartbeat", first_heartbeats_count_once()),
        Wrong(
            "lease-former-holder heartbeat-mismatch heartbeat-first-again heartbeat-malformed",
            query("/heartbeat", expected_last_heartbeat=None),
        ),
        Wrong("lease-history heartbeat-read-back", after("", without_times)),
        Wrong("lease-same-id", new_id_for_a_redelivery()),
        Wrong("heartbeat-first", on("/heartbeat", lambda _: web.Response(status=412))),
        Wrong("heartbeat-next", after("/heartbeat", lambda beat: {**beat, "last_heartbeat": "x"})),
        Wrong(
            "heartbeat-unconditional",
            on(
                "/heartbeat",
                lambda request: (
                    None if "expected_last_heartbeat" in request.query else web.Response(status=400)
                ),
            ),
        ),
        Wrong(
            "heartbeat-stopping stop-force stop-graceful stop-confirm stop-queued",
            on("/stop", lambda _: empty({})),
        ),
        Wrong("stop-repeat", mixed=True),
        Wrong(
            "stop-body",
            on("/stop", lambda r: None if r.can_read_body else web.Response(status=400)),
        ),
        Wrong("stop-final", stopped_items_come_again()),
        Wrong(
            "update-merges update-stopped update-invalid get-item get-unknown stats-counts",
            on("", refused),
        ),
        Wrong("list-pages", query("/work", page=None)),
        Wrong("list-order", after("/work", lambda page: {**page, "data": page["data"][::-1]})),
        Wrong(
            "session-object events-list events-stream",
            on("", lambda r: web.Response(status=404) if "/sessions/" in r.path else None),
        ),
        Wrong(
            "item-secret",
            after("/poll", lambda item: {**item, "secret": None}),
            dialect="anthropic",
        ),
    ]


CASES = {name: wrong for wrong in wrongs() for name in wrong.clauses.split()}


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.name)
async def test_clause_finds_fault_of_wrong_control_plane(
    clause: Clause, http: aiohttp.ClientSession
) -> None:
    wrong, clock = CASES[clause.name], Clock()
    async with ControlPlane(
        environments=(ENV,),
        tokens={TOKEN: None},
        now=lambda: START + (clock() - START) * wrong.speed,
        middlewares=[] if wrong.fault is None else [wrong.fault],
    ) as plane:
        suite = suite_of(plane, http, clock, wrong.dialect)
        if wrong.mixed:
            suite.api.base_url = plane.anthropic_base_url
        finding = await suite.check(clause)
    assert finding.verdict in FOUND, finding.seen
