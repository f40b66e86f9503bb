"""Every clause of the conformance suite, run with the embedded control plane."""

from __future__ import annotations

import asyncio
import json
import re
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.manual_clock import ManualClock
from tests.protocol.conftest import ENV, START, TOKEN, wait_until
from workpool.conformance import (
    CLAUSES,
    Clause,
    EnqueuedItemSource,
    ExistingItemSource,
    Finding,
    ForeignItemsError,
    SessionSource,
    Suite,
    Verdict,
    WorkerApi,
)
from workpool.server import ControlPlane
from workpool.wire.endpoints import ANSWER_LIMIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiohttp

    from workpool.wire.protocol import Dialect

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PAGE = Path(__file__).parents[2] / "workpool/docs/protocol.md"


def make_suite_that_advances_clock(
    plane: ControlPlane,
    http: aiohttp.ClientSession,
    clock: ManualClock,
    dialect: Dialect,
    *,
    token: str = TOKEN,
    api_key: str | None = None,
    **options: Any,
) -> Suite:
    """Return a conformance suite that advances the control plane's clock instead of waiting."""

    async def advance_clock(seconds: float) -> None:
        clock.advance(seconds)

    address = plane.base_url if dialect == "qoder" else plane.anthropic_base_url
    api = WorkerApi(http, address, dialect, ENV, token=token, worker="workpool-conform")
    if api_key is not None:
        options["creator"] = api.copy_as_application(api_key)
    return Suite(
        api, **{"source": EnqueuedItemSource(), "now": clock, "sleep": advance_clock, **options}
    )


@pytest.mark.parametrize("clause", CLAUSES, ids=lambda clause: clause.name)
async def test_embedded_control_plane_fulfils_each_clause_of_conformance_suite(
    clause: Clause,
    control_plane: ControlPlane,
    http_session: aiohttp.ClientSession,
    clock: ManualClock,
    dialect: Dialect,
) -> None:
    finding = await make_suite_that_advances_clock(
        control_plane, http_session, clock, dialect
    ).check_clause(clause)
    assert (finding.verdict, finding.seen) == (Verdict.HOLDS, "")


class ClockOfConcurrentClauses:
    """A clock for clauses that run at the same time.

    The clock advances to the end of the shortest wait when all running clauses wait.
    """

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._waiting: list[tuple[float, asyncio.Future[None]]] = []

    async def wait_until_clock_has_advanced(self, seconds: float) -> None:
        wake = asyncio.get_running_loop().create_future()
        self._waiting.append((self._clock() + seconds, wake))
        await wake

    async def advance_clock_for_waiting_clauses(self) -> None:
        while True:
            await asyncio.sleep(0)
            names = [task.get_name() for task in asyncio.all_tasks()]
            running = sum(name.startswith("clause-") for name in names)
            if self._waiting and len(self._waiting) >= running:
                at, wake = min(self._waiting, key=itemgetter(0))
                self._waiting.remove((at, wake))
                self._clock.now = max(self._clock.now, at)
                wake.set_result(None)


async def test_every_clause_holds_when_suite_runs_clauses_concurrently(
    control_plane: ControlPlane,
    http_session: aiohttp.ClientSession,
    clock: ManualClock,
    dialect: Dialect,
) -> None:
    sleepers = ClockOfConcurrentClauses(clock)
    suite = make_suite_that_advances_clock(
        control_plane, http_session, clock, dialect, sleep=sleepers.wait_until_clock_has_advanced
    )
    started = clock()
    async with asyncio.TaskGroup() as group:
        moving = group.create_task(sleepers.advance_clock_for_waiting_clauses())
        findings = await suite.run(CLAUSES)
        moving.cancel()
    assert [each for each in findings if each.verdict is not Verdict.HOLDS] == []
    assert clock() - started < 120


def test_every_clause_of_protocol_page_is_in_suite() -> None:
    tables = re.findall(r"^\| clause \|.*?(?=\n\n)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `([a-z-]+)` \|", "\n".join(tables), re.MULTILINE)
    assert sorted(rows) == sorted(clause.name for clause in CLAUSES)


def test_protocol_page_reports_that_workpool_serve_passes_every_conformance_clause() -> None:
    results = re.findall(r"^\| `workpool serve` \|.*$", PAGE.read_text(), re.MULTILINE)
    assert [row.split(" | ")[3:] for row in results] == [[f"{len(CLAUSES)}", "0", "0", "0 |"]] * 2


async def check_clause_against_faulty_control_plane(
    name: str, http: aiohttp.ClientSession, fault: Handler
) -> Finding:
    """Check one clause against a control plane with a fault; return the finding."""
    clock = ManualClock(START)
    [clause] = [each for each in CLAUSES if each.name == name]
    async with ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, now=clock, middlewares=[fault]
    ) as plane:
        return await make_suite_that_advances_clock(plane, http, clock, "qoder").check_clause(
            clause
        )


def make_fault_that_replaces_answers(
    path: str, change: Callable[[web.Request], web.Response | None]
) -> Any:
    """Return a fault that replaces the answers to requests whose path ends with `path`."""

    @web.middleware
    async def replace_answer_in_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        changed = change(request) if request.path.endswith(path) else None
        return await handler(request) if changed is None else changed

    return replace_answer_in_middleware


def make_fault_that_rewrites_answers(
    path: str, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Any:
    """Return a fault that changes the JSON objects in answers.

    The fault applies to requests whose path ends with `path`.
    """

    @web.middleware
    async def rewrite_answer_in_middleware(
        request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        response = await handler(request)
        if not request.path.endswith(path) or not isinstance(response, web.Response):
            return response
        assert response.body is None or isinstance(response.body, bytes)
        value = json.loads(response.body) if response.body else None
        if isinstance(value, dict) and response.status == 200:
            return web.json_response(change(value))
        return response

    return rewrite_answer_in_middleware


def make_fault_that_drops_query_parameter(name: str) -> Any:
    """Return a fault that drops a query parameter of every request."""

    @web.middleware
    async def remove_query_parameter(request: web.Request, handler: Handler) -> web.StreamResponse:
        query = {key: value for key, value in request.query.items() if key != name}
        return await handler(request.clone(rel_url=request.rel_url.with_query(query)))

    return remove_query_parameter


@pytest.mark.parametrize(
    ("name", "fault", "verdict", "seen"),
    [
        (
            "poll-empty",
            make_fault_that_replaces_answers("/poll", lambda _: web.Response(status=204)),
            Verdict.DIFFERS,
            "HTTP 204 with no body",
        ),
        (
            "poll-empty",
            make_fault_that_replaces_answers("/poll", lambda _: web.json_response({})),
            Verdict.DIFFERS,
            "HTTP 200 with {}",
        ),
        (
            "poll-empty",
            make_fault_that_replaces_answers("/poll", lambda _: web.Response(text="<p>\x1b[2J")),
            Verdict.BREAKS,
            r"HTTP 200 with <p>\x1b[2J",
        ),
        (
            "poll-item",
            make_fault_that_rewrites_answers("/poll", lambda item: {**item, "state": "sleeping"}),
            Verdict.BREAKS,
            "a worker cannot read the item: state: not one of the protocol's five",
        ),
        (
            "poll-item",
            make_fault_that_rewrites_answers(
                "/poll", lambda item: {**item, "created_at": "2026-03-01T12:00:00"}
            ),
            Verdict.DIFFERS,
            "a time without a zone: created_at",
        ),
        (
            "ack-starts",
            make_fault_that_rewrites_answers("/ack", lambda item: {**item, "state": "active"}),
            Verdict.DIFFERS,
            "the item is active",
        ),
        (
            "heartbeat-mismatch",
            make_fault_that_drops_query_parameter("expected_last_heartbeat"),
            Verdict.BREAKS,
            "two workers can hold one item",
        ),
        (
            "heartbeat-ttl",
            make_fault_that_rewrites_answers(
                "/heartbeat", lambda heartbeat: {**heartbeat, "ttl_seconds": 45}
            ),
            Verdict.DIFFERS,
            "30 s: 45 s instead of 30 s; 10 s: 45 s instead of 10 s; "
            "1 s: 45 s instead of 10 s; 100000 s: 45 s instead of 600 s",
        ),
        (
            "lease-shortened",
            make_fault_that_drops_query_parameter("desired_ttl_seconds"),
            Verdict.DIFFERS,
            "the item comes back only when the longer lease ends",
        ),
        (
            "lease-history",
            make_fault_that_rewrites_answers(
                "/poll", lambda item: {**item, "acknowledged_at": None, "latest_heartbeat_at": None}
            ),
            Verdict.DIFFERS,
            "no trace of it: crashes are not counted as attempts",
        ),
        (
            "poll-redelivers",
            make_fault_that_drops_query_parameter("block_ms"),
            Verdict.HOLDS,
            "",
        ),
        (
            "update-merges",
            make_fault_that_replaces_answers(
                "", lambda request: web.Response(status=403) if request.method == "POST" else None
            ),
            Verdict.UNTRIED,
            "no item can be created: HTTP 403; give --agent or --work-id",
        ),
    ],
)
async def test_conformance_clause_on_faulty_control_plane_has_expected_verdict_and_text(
    http_session: aiohttp.ClientSession, name: str, fault: Handler, verdict: Verdict, seen: str
) -> None:
    finding = await check_clause_against_faulty_control_plane(name, http_session, fault)
    assert (finding.verdict, finding.seen) == (verdict, seen)


async def test_only_clause_about_item_reads_gets_verdict_differs_if_reads_are_refused(
    http_session: aiohttp.ClientSession,
) -> None:
    def refuse_item_reads(request: web.Request) -> web.Response | None:
        single = request.method == "GET" and "/work/work_" in request.path
        return web.Response(status=403) if single else None

    finding = await check_clause_against_faulty_control_plane(
        "get-item", http_session, make_fault_that_replaces_answers("", refuse_item_reads)
    )
    assert finding.verdict is Verdict.DIFFERS
    finding = await check_clause_against_faulty_control_plane(
        "stop-graceful", http_session, make_fault_that_replaces_answers("", refuse_item_reads)
    )
    assert finding.verdict is Verdict.HOLDS


async def test_conformance_suite_gives_verdict_breaks_if_expired_lease_causes_no_redelivery(
    http_session: aiohttp.ClientSession,
) -> None:
    polls = 0

    def answer_later_polls_with_null(_: web.Request) -> web.Response | None:
        nonlocal polls
        polls += 1
        return None if polls == 1 else web.json_response(None)

    finding = await check_clause_against_faulty_control_plane(
        "lease-lapses",
        http_session,
        make_fault_that_replaces_answers("/poll", answer_later_polls_with_null),
    )
    assert finding.verdict is Verdict.BREAKS
    assert finding.seen == "never: an item is lost when its worker dies"


async def test_conformance_suite_refuses_environment_with_item_of_another_client(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, clock: ManualClock
) -> None:
    (item,) = control_plane.enqueue()
    with pytest.raises(ForeignItemsError, match=f"item {item.id} was not created by the suite"):
        await make_suite_that_advances_clock(control_plane, http_session, clock, "qoder").run(
            CLAUSES
        )
    assert control_plane.operations.get_item(ENV, item.id).state == "queued"


async def test_conformance_suite_accepts_environment_with_items_of_its_earlier_run(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, clock: ManualClock
) -> None:
    for _ in range(2):
        [finding] = await make_suite_that_advances_clock(
            control_plane, http_session, clock, "qoder"
        ).run(select_clauses_by_name("ack-starts"))
        assert finding.verdict is Verdict.HOLDS


async def test_conformance_suite_ends_if_another_client_creates_an_item_during_run(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, clock: ManualClock
) -> None:
    suite = make_suite_that_advances_clock(
        control_plane,
        http_session,
        clock,
        "qoder",
        source=ItemSourceWithForeignItems(control_plane),
    )
    with pytest.raises(ForeignItemsError, match="not created by the suite, came"):
        await suite.run(select_clauses_by_name("ack-starts", "lease-held"))


class ItemSourceWithForeignItems(EnqueuedItemSource):
    """A source that creates an item of another client before each item of the suite."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def create_item(self, api: WorkerApi, script: Any = None) -> str:
        self._plane.enqueue()
        return await super().create_item(api, script)


async def test_conformance_suite_stops_items_of_other_clients_in_declared_test_environment(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, clock: ManualClock
) -> None:
    items = control_plane.enqueue(3)
    # Two nodes on PostgreSQL deliver the items of one millisecond in any order. Advance the clock,
    # so that the suite's own item is created later than these items and delivered after them.
    clock.advance(1)
    suite = make_suite_that_advances_clock(
        control_plane, http_session, clock, "qoder", test_environment=True
    )
    [finding] = await suite.run(select_clauses_by_name("ack-starts"))
    assert finding.verdict is Verdict.HOLDS
    assert {control_plane.operations.get_item(ENV, item.id).state for item in items} == {"stopped"}


async def test_conformance_suite_stops_the_items_that_each_clause_created(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, clock: ManualClock
) -> None:
    await make_suite_that_advances_clock(control_plane, http_session, clock, "qoder").run(
        select_clauses_by_name("list-pages", "ack-lease")
    )
    items = control_plane.operations.list_items(ENV).items
    assert [item.state for item in items] == ["stopped"] * 3


async def test_conformance_suite_gives_verdict_untried_after_all_given_items_are_used(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, clock: ManualClock
) -> None:
    given = [item.id for item in control_plane.enqueue(2)]
    suite = make_suite_that_advances_clock(
        control_plane, http_session, clock, "qoder", source=ExistingItemSource(given), given=given
    )
    findings = await suite.run(select_clauses_by_name("ack-starts", "stop-force", "lease-held"))
    assert [each.verdict for each in findings] == [Verdict.HOLDS, Verdict.HOLDS, Verdict.UNTRIED]
    assert findings[-1].seen == "all given items are used"


def select_clauses_by_name(*names: str) -> list[Clause]:
    return [clause for name in names for clause in CLAUSES if clause.name == name]


@pytest.mark.parametrize(
    "answer",
    [
        b"null",
        b"[]",
        b"{}",
        b"7",
        b'"text"',
        b"<html>",
        b"\xff",
        b'{"id": 7, "data": 7, "error": 7, "metadata": [1], "agent": 7, "ttl_seconds": "x"}',
        b'{"id": "work_1", "data": {"id": []}, "state": [], "last_heartbeat": {}}',
        b'{"id": "work_1", "data": [7, {}, {"id": {}}], "next_page": {"a": 1}}',
        b'{"data": [{"id": "work_1", "type": 7, "metadata": 7}], "next_page": "again"}',
    ],
)
async def test_malformed_response_gives_conformance_verdict_instead_of_exception(
    http_session: aiohttp.ClientSession, answer: bytes
) -> None:
    clock = ManualClock(START)

    @web.middleware
    async def send_malformed_answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "POST" and request.path.endswith("/work"):
            # The suite must be able to create items, because it does not try a clause without an
            # item.
            return await handler(request)
        return web.Response(body=answer, content_type="application/json")

    async with ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, now=clock, middlewares=[send_malformed_answer]
    ) as plane:
        suite = make_suite_that_advances_clock(
            plane, http_session, clock, "qoder", test_environment=True
        )
        for clause in CLAUSES:
            finding = await suite.check_clause(clause)
            assert finding.verdict is not Verdict.HOLDS or clause.name == "poll-empty"


async def test_conformance_suite_ends_within_time_limit_if_control_plane_never_answers(
    http_session: aiohttp.ClientSession,
) -> None:
    hung = asyncio.Event()

    @web.middleware
    async def never_answer_polls(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.endswith("/poll"):
            await hung.wait()
        return await handler(request)

    async with ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, middlewares=[never_answer_polls]
    ) as plane:
        api = WorkerApi(
            http_session, plane.base_url, "qoder", ENV, token=TOKEN, worker="workpool-conform"
        )
        suite = Suite(api, EnqueuedItemSource(), seconds=0.2)
        findings = await suite.run(CLAUSES)
        hung.set()
    late = [each for each in findings if each.seen.startswith("the time of the whole suite")]
    assert len(late) > len(CLAUSES) / 2
    assert {each.verdict for each in late} == {Verdict.UNTRIED}


HELD_STATES = ["active", "starting"]


async def test_conformance_suite_stops_its_items_when_it_is_cancelled(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession
) -> None:
    api = WorkerApi(
        http_session, control_plane.base_url, "qoder", ENV, token=TOKEN, worker="workpool-conform"
    )
    suite = Suite(api, EnqueuedItemSource())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(suite.run(select_clauses_by_name("lease-held", "ack-lease")))
        await wait_until(
            lambda: (
                [item.state for item in control_plane.operations.list_items(ENV).items]
                == HELD_STATES
            )
        )
        running.cancel()
    assert {item.state for item in control_plane.operations.list_items(ENV).items} == {"stopped"}


async def test_conformance_suite_can_create_its_items_by_creating_sessions(
    control_plane: ControlPlane, http_session: aiohttp.ClientSession, clock: ManualClock
) -> None:
    source = SessionSource("agent_00000000000070008000000000000001")
    suite = make_suite_that_advances_clock(
        control_plane, http_session, clock, "anthropic", source=source
    )
    names = ("ack-starts", "lease-lapses", "session-object", "result-once")
    findings = await suite.run(select_clauses_by_name(*names))
    assert [(each.verdict, each.seen) for each in findings] == [
        (Verdict.HOLDS, ""),
        (Verdict.HOLDS, ""),
        (Verdict.HOLDS, ""),
        (Verdict.UNTRIED, "only the call of `workpool serve` can script a session"),
    ]


WORKER_KEY = "key-of-a-worker-that-may-only-poll-ack-beat-stop-and-list"
OPTIONAL = {
    "update-merges",
    "update-stopped",
    "update-invalid",
    "get-item",
    "get-unknown",
    "stats-counts",
}


async def test_each_conformance_clause_holds_for_worker_key_unless_key_forbids_its_calls(
    http_session: aiohttp.ClientSession, clock: ManualClock, dialect: Dialect
) -> None:
    async with ControlPlane(
        environments=(ENV,), tokens={TOKEN: None}, worker_keys=(WORKER_KEY,), now=clock
    ) as plane:
        suite = make_suite_that_advances_clock(
            plane, http_session, clock, dialect, token=WORKER_KEY, api_key=TOKEN
        )
        for clause in CLAUSES:
            finding = await suite.check_clause(clause)
            expected = Verdict.DIFFERS if clause.name in OPTIONAL else Verdict.HOLDS
            assert finding.verdict is expected, finding


async def test_conformance_finding_hides_token_that_response_repeats(
    http_session: aiohttp.ClientSession,
) -> None:
    def repeat_token_in_error(request: web.Request) -> web.Response:
        authorization = request.headers["Authorization"]
        return web.json_response({"error": {"message": f"no: {authorization}"}}, status=404)

    finding = await check_clause_against_faulty_control_plane(
        "stop-body",
        http_session,
        make_fault_that_replaces_answers("/stop", repeat_token_in_error),
    )
    assert finding.seen == "HTTP 404 (no: Bearer [token])"


async def test_conformance_suite_gives_verdict_untried_if_response_exceeds_size_limit(
    http_session: aiohttp.ClientSession,
) -> None:
    def send_oversized_answer(_: web.Request) -> web.Response:
        return web.Response(body=b" " * (ANSWER_LIMIT_BYTES + 1))

    finding = await check_clause_against_faulty_control_plane(
        "get-unknown",
        http_session,
        make_fault_that_replaces_answers("/work_" + "0" * 32, send_oversized_answer),
    )
    assert finding.verdict is Verdict.UNTRIED
    assert finding.seen == f"an answer of more than {ANSWER_LIMIT_BYTES} bytes"
