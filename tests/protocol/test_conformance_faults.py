"""Every clause of the conformance suite can fail: each one detects a faulty control plane.

A faulty control plane is the embedded one with a fault in front of it, or with a clock that
runs faster or slower than the suite's.
"""

from __future__ import annotations

import json
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from aiohttp import web

from tests.manual_clock import ManualClock
from tests.protocol.conftest import ENV, START, TOKEN
from tests.protocol.test_conformance import make_suite_that_advances_clock
from workpool.conformance import CLAUSES, Clause, Verdict
from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import Callable

    import aiohttp

    from workpool.wire.protocol import Dialect

DETECTING_VERDICTS = {Verdict.DIFFERS, Verdict.BREAKS}


class FaultyControlPlane(NamedTuple):
    """A control plane with one fault, and the clauses that must detect it.

    Attributes:
        clauses: The names of the clauses, separated by spaces.
        fault: A middleware that injects the fault; None without one.
        speed: The seconds by which the control plane's clock advances in one second of the suite.
        dialect: The dialect of the suite.
        mixed: Whether the control plane uses the other dialect than the suite.
    """

    clauses: str
    fault: Any = None
    speed: float = 1.0
    dialect: Dialect = "qoder"
    mixed: bool = False


def make_fault_that_replaces_answers(
    path: str, change: Callable[[web.Request], web.Response | None]
) -> Any:
    """Return a fault that replaces the answers to requests whose path ends with `path`."""

    @web.middleware
    async def replace_answer_in_middleware(
        request: web.Request, handler: Any
    ) -> web.StreamResponse:
        changed = change(request) if request.path.endswith(path) else None
        response: web.StreamResponse = changed or await handler(request)
        return response

    return replace_answer_in_middleware


def make_fault_that_rewrites_answers(path: str, change: Callable[[Any], Any]) -> Any:
    """Return a fault that changes the JSON of successful answers.

    The fault applies to requests whose path ends with `path`.
    """

    @web.middleware
    async def rewrite_answer_in_middleware(
        request: web.Request, handler: Any
    ) -> web.StreamResponse:
        response: web.Response = await handler(request)
        if not request.path.endswith(path) or response.status != 200:
            return response
        value = json.loads(response.text or "null")
        return web.json_response(change(value) if isinstance(value, dict) else value)

    return rewrite_answer_in_middleware


def make_fault_that_replaces_errors(answer: Callable[[int], web.Response]) -> Any:
    """Return a fault that replaces each response whose status is 400 or higher.

    `answer` receives this status and returns the replacement.
    """

    @web.middleware
    async def replace_answer_in_middleware(
        request: web.Request, handler: Any
    ) -> web.StreamResponse:
        response: web.Response = await handler(request)
        return answer(response.status) if response.status >= 400 else response

    return replace_answer_in_middleware


def make_fault_that_changes_query(path: str, **values: str | None) -> Any:
    """Return a fault that sets query parameters of requests whose path ends with `path`.

    The value None removes a parameter.
    """

    @web.middleware
    async def change_query_parameters(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path.endswith(path):
            merged = {**request.query, **values}
            kept = {name: value for name, value in merged.items() if value is not None}
            request = request.clone(rel_url=request.rel_url.with_query(kept))
        response: web.StreamResponse = await handler(request)
        return response

    return change_query_parameters


def make_fault_that_swaps_first_two_deliveries() -> Any:
    swapped = False

    @web.middleware
    async def skip_first_delivered_item(request: web.Request, handler: Any) -> web.StreamResponse:
        nonlocal swapped
        response: web.Response = await handler(request)
        if not request.path.endswith("/poll") or swapped or response.body == b"null":
            return response
        swapped = True
        return cast("web.Response", await handler(request))

    return skip_first_delivered_item


def make_fault_that_changes_item_id_at_redelivery() -> Any:
    known: set[str] = set()

    def change_id_of_redelivered_item(item: dict[str, Any]) -> dict[str, Any]:
        again = item["id"] in known
        known.add(item["id"])
        return {**item, "id": f"{item['id']}-again"} if again else item

    return make_fault_that_rewrites_answers("/poll", change_id_of_redelivered_item)


def deliver_stopped_items_again() -> Any:
    polled: list[web.Response] = []

    @web.middleware
    async def deliver_stopped_item(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.Response = await handler(request)
        if not request.path.endswith("/poll"):
            return response
        if response.body != b"null":
            polled.append(response)
            return response
        return web.Response(body=polled[-1].body, content_type="application/json")

    return deliver_stopped_item


def refuse_retries_of_first_heartbeats() -> Any:
    begun: set[str] = set()

    def refuse_retry_of_first_heartbeat(request: web.Request) -> web.Response | None:
        if request.query.get("expected_last_heartbeat") != "NO_HEARTBEAT":
            return None
        again = request.path in begun
        begun.add(request.path)
        return web.Response(status=412) if again else None

    return make_fault_that_replaces_answers("/heartbeat", refuse_retry_of_first_heartbeat)


def refuse_item_reads_and_stats(request: web.Request) -> web.Response | None:
    path = request.path.partition("/work")[2]
    item = path.startswith("/work_") and path.count("/") == 1
    return web.Response(status=403) if item or path == "/stats" else None


def set_time_fields_to_none(value: dict[str, Any]) -> dict[str, Any]:
    return {name: None if name.endswith("_at") else each for name, each in value.items()}


def make_faulty_control_planes() -> list[FaultyControlPlane]:
    acked = count(10)
    empty = web.json_response
    return [
        FaultyControlPlane(
            "auth-missing auth-wrong environment-unknown heartbeat-queued heartbeat-stopped"
            " ack-other-worker ack-stopped ack-unknown result-once result-unknown",
            make_fault_that_replaces_errors(lambda _: web.json_response({})),
        ),
        FaultyControlPlane(
            "error-envelope",
            make_fault_that_replaces_errors(lambda status: web.Response(status=status)),
        ),
        FaultyControlPlane(
            "poll-delivers",
            make_fault_that_rewrites_answers("/poll", lambda item: {**item, "state": "starting"}),
        ),
        FaultyControlPlane(
            "poll-once", make_fault_that_changes_query("/poll", reclaim_older_than_ms="0")
        ),
        FaultyControlPlane(
            "poll-redelivers poll-reclaim",
            make_fault_that_changes_query("/poll", reclaim_older_than_ms="99999999"),
        ),
        FaultyControlPlane(
            "poll-blocks poll-block-range", make_fault_that_changes_query("/poll", block_ms=None)
        ),
        FaultyControlPlane(
            "poll-empty",
            make_fault_that_replaces_answers("/poll", lambda _: web.Response(status=204)),
        ),
        FaultyControlPlane(
            "poll-item",
            make_fault_that_rewrites_answers(
                "/poll", lambda item: {k: v for k, v in item.items() if k != "metadata"}
            ),
        ),
        FaultyControlPlane("poll-oldest-first", make_fault_that_swaps_first_two_deliveries()),
        FaultyControlPlane(
            "ack-starts",
            make_fault_that_rewrites_answers("/ack", lambda item: {**item, "state": "active"}),
        ),
        FaultyControlPlane(
            "ack-repeat",
            make_fault_that_rewrites_answers(
                "/ack", lambda it: {**it, "acknowledged_at": str(next(acked))}
            ),
        ),
        FaultyControlPlane("ack-lease lease-held lease-lapses", speed=3),
        FaultyControlPlane("poll-reclaim-lease", speed=60),
        FaultyControlPlane("lease-stopping", speed=0.01),
        FaultyControlPlane(
            "lease-shortened heartbeat-ttl",
            make_fault_that_changes_query("/heartbeat", desired_ttl_seconds="600"),
        ),
        FaultyControlPlane(
            "heartbeat-ttl-zero",
            make_fault_that_changes_query("/heartbeat", desired_ttl_seconds=None),
        ),
        FaultyControlPlane("lease-first-heartbeat", refuse_retries_of_first_heartbeats()),
        FaultyControlPlane(
            "lease-former-holder heartbeat-mismatch heartbeat-first-again heartbeat-malformed",
            make_fault_that_changes_query("/heartbeat", expected_last_heartbeat=None),
        ),
        FaultyControlPlane(
            "lease-history heartbeat-read-back",
            make_fault_that_rewrites_answers("", set_time_fields_to_none),
        ),
        FaultyControlPlane("lease-same-id", make_fault_that_changes_item_id_at_redelivery()),
        FaultyControlPlane(
            "heartbeat-first",
            make_fault_that_replaces_answers("/heartbeat", lambda _: web.Response(status=412)),
        ),
        FaultyControlPlane(
            "heartbeat-next",
            make_fault_that_rewrites_answers(
                "/heartbeat", lambda beat: {**beat, "last_heartbeat": "x"}
            ),
        ),
        FaultyControlPlane(
            "heartbeat-unconditional",
            make_fault_that_replaces_answers(
                "/heartbeat",
                lambda request: (
                    None if "expected_last_heartbeat" in request.query else web.Response(status=400)
                ),
            ),
        ),
        FaultyControlPlane(
            "heartbeat-stopping stop-force stop-graceful stop-confirm stop-queued",
            make_fault_that_replaces_answers("/stop", lambda _: empty({})),
        ),
        FaultyControlPlane("stop-repeat", mixed=True),
        FaultyControlPlane(
            "stop-body",
            make_fault_that_replaces_answers(
                "/stop", lambda r: None if r.can_read_body else web.Response(status=400)
            ),
        ),
        FaultyControlPlane("stop-final", deliver_stopped_items_again()),
        FaultyControlPlane(
            "update-merges update-stopped update-invalid get-item get-unknown stats-counts",
            make_fault_that_replaces_answers("", refuse_item_reads_and_stats),
        ),
        FaultyControlPlane("list-pages", make_fault_that_changes_query("/work", page=None)),
        FaultyControlPlane(
            "list-order",
            make_fault_that_rewrites_answers(
                "/work", lambda page: {**page, "data": page["data"][::-1]}
            ),
        ),
        FaultyControlPlane(
            "session-object events-list events-stream",
            make_fault_that_replaces_answers(
                "", lambda r: web.Response(status=404) if "/sessions/" in r.path else None
            ),
        ),
        FaultyControlPlane(
            "item-secret",
            make_fault_that_rewrites_answers("/poll", lambda item: {**item, "secret": None}),
            dialect="anthropic",
        ),
    ]


FAULTY_PLANE_OF_CLAUSE = {
    name: faulty for faulty in make_faulty_control_planes() for name in faulty.clauses.split()
}


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.name)
async def test_each_conformance_clause_detects_a_control_plane_that_violates_it(
    clause: Clause, http_session: aiohttp.ClientSession
) -> None:
    faulty, clock = FAULTY_PLANE_OF_CLAUSE[clause.name], ManualClock(START)
    async with ControlPlane(
        environments=(ENV,),
        tokens={TOKEN: None},
        now=lambda: START + (clock() - START) * faulty.speed,
        middlewares=[] if faulty.fault is None else [faulty.fault],
    ) as plane:
        suite = make_suite_that_advances_clock(plane, http_session, clock, faulty.dialect)
        if faulty.mixed:
            suite.api.base_url = plane.anthropic_base_url
        finding = await suite.check_clause(clause)
    assert finding.verdict in DETECTING_VERDICTS, finding.seen
