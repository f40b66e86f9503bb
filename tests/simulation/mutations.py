"""Mutations of the pool: faulty code changes, each of which the simulation must detect.

A mutation replaces lines of a function. A mutation whose lines do not exist is an error. As a
script, this module prints which invariant caught each mutation, and after how many schedules:

    python tests/simulation/mutations.py [PART OF A NAME …]
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.simulation.runner import generate_schedule_for_seed, simulate_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LIMIT = 2000


class SourceEdit(NamedTuple):
    """A replacement of the text `old` by `new` in one function of a class.

    Only one function of the class contains `old`.

    Attributes:
        where: `module:Class`. The module is relative to `workpool.pool`, or to `workpool` if it has
            a dot. A module that begins with `workpool` is complete.
    """

    where: str
    old: str
    new: str


MUTATIONS: dict[str, list[SourceEdit]] = {
    "no deduplication of items": [
        SourceEdit(
            "dispatcher:Dispatcher", "owned = self.items.find_item(work_item.id)", "owned = None"
        ),
        # Also disable the check that declines an item if the pool owns another item of its agent
        # session: with the first edit alone, this check would decline a duplicate item, too.
        SourceEdit(
            "dispatcher:Dispatcher", "self.items.has_agent_session(work_item.session_id)", "False"
        ),
        SourceEdit(
            "pool_item:OwnedItems",
            "del self._by_id[item.id]",
            "self._by_id.pop(item.id, None)",
        ),
    ],
    "two items of one session": [
        SourceEdit(
            "dispatcher:Dispatcher", "self.items.has_agent_session(work_item.session_id)", "False"
        ),
    ],
    "more acknowledged items than slots": [
        SourceEdit("bounded_queue:BoundedQueue", "self.running >= self.concurrency", "False"),
    ],
    "more runs than the limit of their handler": [
        SourceEdit("dispatcher:Dispatcher", "and self._slots.has_free_slot(item.handler)", ""),
    ],
    "item taken during a pause": [
        SourceEdit(
            "dispatcher:Dispatcher",
            " or self._admission.pause_reason is not None",
            "",
        ),
    ],
    "poll during a pause": [
        SourceEdit("admission:Admission", "while self.pause_reason is not None or", "while"),
        SourceEdit(
            "dispatcher:Dispatcher",
            " or self._admission.pause_reason is not None",
            "",
        ),
    ],
    "claims beyond the limit of sessions": [
        SourceEdit("bounded_queue:BoundedQueue", "self._uses -= 1", "pass"),
    ],
    "claims in flight not limited": [
        SourceEdit(
            "supervisor:Supervisor",
            "settings.exit_after_sessions,",
            "None,",
        ),
    ],
    "shared slot taken although none is free": [
        SourceEdit(
            "shared_slots:SharedSlots",
            "if not self.count_available_slots(share):",
            "if False:",
        ),
    ],
    "slot of another environment taken": [
        SourceEdit("shared_slots:SharedSlots", "max(1, each)", "each"),
        SourceEdit("shared_slots:SharedSlots", "max(0, left - sum(taken))", "99"),
    ],
    "shared slot not given back": [
        SourceEdit(
            "bounded_queue:BoundedQueue", "self._share.return_slot(used_up=used_up)", "pass"
        ),
    ],
    "shared slots of forgotten items not given back": [
        SourceEdit("bounded_queue:BoundedQueue", "for _ in self._waiting:", "for _ in ():"),
    ],
    "poll before reserving": [
        SourceEdit(
            "bounded_queue:BoundedQueue",
            "self._count_free_places() > 0\n        and not self._reservers\n        and",
            "True or",
        ),
    ],
    "two supervisors under one Worker-ID": [
        SourceEdit("supervisor:Supervisor", "-{secrets.token_hex(4)}", ""),
    ],
    "409 to an ack ignored": [SourceEdit("claim:Claimer", '= "conflict"', '= "ok"')],
    "ack that answers active taken for ours": [
        SourceEdit("lease:Lease", "item.state == ACTIVE and parents_heartbeat is None", "False"),
    ],
    "unsettled item read after a 412": [
        SourceEdit("lease:Lease", "if not self.unsettled:", "if True:"),
    ],
    "unsettled lease counted from its ack": [
        SourceEdit(
            "lease:Lease",
            "polled_at if self.unsettled and polled_at is not None else acked_at",
            "acked_at",
        ),
    ],
    "item that a poll leased to another taken for ours": [
        SourceEdit(
            "lease:Lease",
            "item.state == STARTING and (self._in_handoff or self.item.state == ACTIVE)",
            "item.state == STARTING and self._in_handoff",
        ),
    ],
    "handler before the first heartbeat": [
        SourceEdit(
            "claim:Claimer", "while not lease.end_if_expired(self._clock()):", "while False:"
        ),
        SourceEdit("pool_item:PoolItem", "if lease.begun and lease.is_held(", "if lease.is_held("),
    ],
    "first heartbeat unchecked": [
        SourceEdit(
            "item_requests:HeartbeatSender",
            "partial(self._check_lease_before_heartbeat, lease, check)",
            "partial(self._check_lease_before_heartbeat, lease, check) if lease.begun else None",
        ),
    ],
    "renewer takes a lease that has not begun": [
        SourceEdit(
            "session_runner:SessionRunner",
            "await self._claimer.send_first_heartbeats(item)\n"
            "    self._context.renewer.add_lease(lease, item)",
            "self._context.renewer.add_lease(lease, item)\n"
            "    await self._claimer.send_first_heartbeats(item)",
        ),
    ],
    "no last heartbeat for a claim that a drain ends": [
        SourceEdit(
            "claim:Claimer",
            "lease.schedule_last_heartbeat(self._clock(), RELEASE_DELAY_SECONDS)",
            "return",
        ),
    ],
    "refusal of an optional call not remembered": [
        SourceEdit(
            "call_permissions:OptionalCalls",
            "if op in self.refused:",
            "if False:",
        ),
    ],
    "lost runs not counted": [
        SourceEdit("session_runner:SessionRunner", "self._runs.count_item_run(item.id)", "pass"),
    ],
    "refusal after a success taken for a missing permission": [
        SourceEdit("call_permissions:OptionalCalls", "op in self._allowed or ", ""),
    ],
    "412 taken for lost": [
        SourceEdit(
            "lease:Lease",
            "owner_unknown=self._unanswered or self._in_handoff",
            "owner_unknown=False",
        ),
    ],
    "loss ignored": [
        SourceEdit(
            "session_runner:SessionRunner",
            "self._executor.cancel_handler(item, EndReason.LOST)",
            "0",
        ),
    ],
    "heartbeat after loss": [
        SourceEdit(
            "lease:Lease", 'if self.status == "held" and now >= self.give_up_at:', "if 0 > 1:"
        ),
        SourceEdit("item_requests:HeartbeatSender", "lease.check_held(now)", "pass"),
    ],
    "deadline from the answer": [
        SourceEdit(
            "lease:Lease",
            "self._apply_extension(attempt, heartbeat)",
            "self._apply_extension(attempt._replace(at=now), heartbeat)",
        ),
    ],
    "lease not cut by an unanswered heartbeat": [
        SourceEdit(
            "lease:Lease",
            "self._set_deadline(min(before, now + ttl), min(self.ttl, ttl))",
            "pass",
        ),
    ],
    "no margin before the deadline": [
        SourceEdit("lease:Lease", "lease_margin(ttl)", "0.0"),
    ],
    "sleep not noticed": [
        SourceEdit(
            "lease_renewer:LeaseRenewer",
            'if now >= lease.give_up_at and lease.status == "held":',
            "if 0 > 1:",
        ),
        SourceEdit("lease:Lease", " and now < self.deadline", ""),
    ],
    "renewal unchecked": [
        SourceEdit(
            "item_requests:HeartbeatSender",
            "partial(self._check_lease_before_heartbeat, lease, check)",
            "None if lease.begun else partial(self._check_lease_before_heartbeat, lease, check)",
        ),
    ],
    "completion without a held lease": [
        SourceEdit(
            "item_requests:ItemSender",
            "lease.check_held(self._clock() if now is None else now)",
            "pass",
        ),
    ],
    "stop after loss": [
        SourceEdit(
            "item_requests:ItemSender",
            "lease.check_held(self._clock() if now is None else now)",
            "pass",
        ),
        SourceEdit("completion:Completion", 'if row.item == "untouched":', "if False:"),
    ],
    "metadata after loss": [
        SourceEdit(
            "item_requests:ItemSender",
            "lease.check_held(self._clock() if now is None else now)",
            "pass",
        ),
        SourceEdit(
            "session_runner:SessionRunner",
            "self._executor.cancel_handler(item, EndReason.LOST)",
            "0",
        ),
    ],
    "no check after the wait": [
        SourceEdit(
            "item_requests:ItemSender",
            "call_options = CallOptions(check,",
            "call_options = CallOptions(before_bytes,",
        ),
    ],
    "pause not noticed": [
        SourceEdit("machine_pauses:MachinePauseDetector", ">= PAUSE_SECONDS", ">= 1e9"),
        SourceEdit(
            "item_requests:ItemSender",
            "unseen = self._pauses.seconds_missed_by_lease_clock(lease.clock_offset, now)",
            "unseen = 0.0",
        ),
    ],
    "pause noticed at the next check only": [
        SourceEdit(
            "item_requests:ItemSender",
            "paused = abs(unseen) >= PAUSE_SECONDS",
            "paused = lease._verification_requested",
        ),
    ],
    "pause ended by a heartbeat before it": [
        SourceEdit(
            "item_requests:HeartbeatSender",
            "lease.apply_heartbeat_answer(self._clock(), attempt, outcome)",
            "lease.apply_heartbeat_answer(self._clock(), "
            "attempt._replace(clock_offset=self._pauses.wall_clock_offset()), outcome)",
        ),
    ],
    "pause during a claim not noticed": [
        SourceEdit(
            "claim:Claimer", "self._pauses.was_machine_paused(lease.clock_offset, now)", "False"
        ),
    ],
    "one try for all the time that is left": [
        SourceEdit(
            "item_requests:ItemSender",
            "min(\n"
            "            self._request_timeout, "
            "self._seconds_left_to_send(item, until, now) / TRY_PART\n"
            "        )",
            "self._seconds_left_to_send(item, until, now)",
        ),
    ],
    "completion given up after ten seconds": [
        SourceEdit(
            "completion:Completion",
            'await self.stop_item(item, confirm=row.outcome == "stopped")',
            'await self.stop_item(item, confirm=row.outcome == "stopped", seconds=10.0)',
        ),
    ],
    "completion behind claims in the line": [
        SourceEdit(
            "item_requests:ItemSender",
            "try_acquire_permit(options.priority)",
            "try_acquire_permit(Priority.HANDLER)",
        ),
        SourceEdit(
            "item_requests:ItemSender",
            "await self._client.acquire_permit(options.priority)",
            "await self._client.acquire_permit(Priority.HANDLER)",
        ),
    ],
    "renewer with the client of the handlers' loop": [
        SourceEdit(
            "supervisor:Supervisor",
            "self._wall, self._new_client, callbacks",
            "self._wall, lambda: self._client, callbacks",
        ),
    ],
    "host names looked up on the default executor": [
        SourceEdit(
            "wire.http.resolver:ThreadedDnsResolver",
            "loop.run_in_executor(self._executor, ",
            "loop.run_in_executor(None, ",
        ),
    ],
    "token read on the default executor": [
        SourceEdit(
            "wire.http.credential_renewal:CredentialSource",
            "loop.run_in_executor(executor, self._read)",
            "loop.run_in_executor(None, self._read)",
        ),
    ],
    "ack behind completions in the line": [
        SourceEdit("claim:Claimer", "permit=retry is None", "permit=False")
    ],
    "refused acks not backed off": [
        SourceEdit(
            "poller:PollerGroup", "self.begin_cooldown(self._ack_backoff.next_delay())", "0"
        ),
    ],
    "failing handler claims on": [
        SourceEdit(
            "handler_health:HandlerHealth",
            "return failures is None or self._failures_allow_claim(failures)",
            "return True",
        ),
    ],
    "pause of a failing handler does not grow": [
        SourceEdit(
            "handler_health:HandlerHealth",
            "max(FAILING_PAUSE_SECONDS, 2 * failures.pause)",
            "FAILING_PAUSE_SECONDS",
        ),
    ],
    "handler starts after the machine has slept": [
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "if not item.lease.is_held(now):",
            "if False:",
        ),
    ],
    "handler starts after a pause of the machine": [
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "self._pauses.was_machine_paused(item.lease.clock_offset, now)",
            "False",
        ),
    ],
    "cancellation never repeated": [
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "REPEAT_SECONDS, self._repeat_cancellation, item",
            "99999, self._repeat_cancellation, item",
        ),
    ],
    "sessions in one context": [
        SourceEdit(
            "dispatcher:Dispatcher",
            "PoolItem(work_item, None, self._context.start_context.copy(),",
            "PoolItem(work_item, None, self._context.start_context,",
        ),
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "context=item.task_context.copy()",
            "context=item.task_context",
        ),
    ],
    "failed call not repeated": [
        SourceEdit("handler_executor:HandlerExecutor", "or not self._may_retry(item)", "or True"),
    ],
    "drain does not end the wait for a retry": [
        SourceEdit("handler_executor:HandlerExecutor", "if session.draining:", "if False:"),
    ],
    "stop request does not end the wait for a retry": [
        SourceEdit("handler_executor:HandlerExecutor", "if session.stopping:", "if False:"),
    ],
    "drain that fails what waits for a retry": [
        SourceEdit(
            "handler_executor:HandlerExecutor", "raise PoolRelease(DRAIN_REASON) from", "raise"
        ),
    ],
    "retry after the machine has slept": [
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "if not self._lease_allows_handler_call(item):\n        raise",
            "if False:\n        raise",
        ),
    ],
    "retry late": [
        SourceEdit(
            "handler_executor:HandlerExecutor", "backoff.next_delay(), error", "99.0, error"
        ),
    ],
    "retries without end": [
        SourceEdit("handler_executor:HandlerExecutor", "session.retry += 1", "session.retry += 0"),
    ],
    "retries not counted": [
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "self._observe(HandlerRetried, session, item.handler_label, session.retry, error)",
            "0",
        ),
    ],
    "number of a retry not left to the next run": [
        SourceEdit("attempt_number:AttemptNumber", "patch[RETRIES] = str(retry)", "pass"),
    ],
    "number of a retry not taken over": [
        SourceEdit(
            "attempt_number:AttemptNumber", "int(retries) if _match_number(retries) else 0", "0"
        ),
    ],
    "session without progress never ended": [
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "self.cancel_handler(item, EndReason.STALLED)",
            "pass",
        ),
    ],
    "progress not counted": [
        SourceEdit(
            "session_backend:PoolSessionBackend",
            "self._item.progressed_at = self._context.clock()",
            "pass",
        ),
    ],
    "stall while a session waits for a person": [
        SourceEdit("pool_item:PoolItem", "0.0 if self.waits else max", "max"),
    ],
    "halt of the machine counted as silence": [
        SourceEdit("handler_executor:HandlerExecutor", "late += lateness", "pass"),
    ],
    "own stop taken for an operator's": [
        SourceEdit(
            "completion:Completion",
            "options, lease.record_own_stop",
            "options, None",
        ),
    ],
    "drained is stopped": [
        SourceEdit(
            "completion:Completion",
            "row = find_completion_actions(item)",
            "reason = item.end_reason; "
            "row = TABLE[reason if reason != EndReason.DRAINED else EndReason.RETURNED]",
        ),
    ],
    "released by silence": [
        SourceEdit(
            "completion:Completion",
            "self._renewer.request_last_heartbeat(lease, read_release_delay_seconds(release))",
            "0",
        ),
    ],
    "unwritten taken for written": [
        SourceEdit("completion:Completion", 'return "released"', "return row.outcome"),
    ],
    "id given up at the cancellation": [
        SourceEdit(
            "handler_executor:HandlerExecutor",
            "await create_future_of_task_end(task)",
            'lost = asyncio.ensure_future(item.wait_until(lambda: item.lease.status != "held"))\n'
            '        await asyncio.wait({task, lost}, return_when="FIRST_COMPLETED")\n'
            "        lost.cancel()\n"
            "        if not task.done():\n"
            "            return",
        ),
    ],
    "drain that cancels heartbeats": [
        SourceEdit(
            "dispatcher:Dispatcher",
            "item.session.interrupt(draining=True)",
            "item.session.interrupt(draining=True); self._context.renewer.remove_lease(item.lease)",
        ),
    ],
    "completion not awaited": [
        SourceEdit(
            "drain:Drain",
            "await self._wait_until_items_finished(dispatcher, lambda: until)",
            "pass",
        ),
    ],
    "close not idempotent": [
        SourceEdit("session_runner:SessionRunner", 'if item.state == "closed":', "if False:"),
    ],
    "heartbeats during the handoff": [
        SourceEdit(
            "handoff:HandoffRunner",
            "lease.suspend_heartbeats()",
            "lease.suspend_heartbeats(); self._renewer.send_handoff_heartbeat(lease)",
        ),
    ],
    "a child's heartbeat taken for our own": [
        SourceEdit(
            "lease:Lease",
            "self._in_handoff and ours and item.last_heartbeat != self.expected",
            "False",
        ),
    ],
    "completion before the handoff is settled": [
        SourceEdit(
            "session_runner:SessionRunner",
            "await finish_handoff(item, item.handoff, self._context.renewer)",
            "pass",
        ),
        SourceEdit(
            "item_requests:ItemSender",
            'item.handoff is not None and item.handoff.state != "closed"',
            "False",
        ),
    ],
    "no child, and the item not taken back": [
        SourceEdit(
            "handoff:HandoffRunner",
            "await self._wait_for_child()\n            await self._send_heartbeat()",
            "await self._wait_for_child()",
        ),
    ],
    "a child that does not expect its parent's heartbeat": [
        SourceEdit(
            "session_runner:SessionRunner",
            "parents_heartbeat=item.parents_heartbeat",
            "parents_heartbeat=None",
        ),
    ],
    "items not counted": [
        SourceEdit(
            "dispatcher:Dispatcher",
            "self._context.observe(ItemReceived, work_item, origin, age)",
            "0",
        ),
    ],
    "reclaims not counted": [
        SourceEdit(
            "dispatcher:Dispatcher",
            'self._context.observe(ItemReclaimed, item.work_item, "gained", "poll")',
            "0",
        ),
    ],
    "losses not counted": [
        SourceEdit(
            "session_runner:SessionRunner",
            'self._context.observe(ItemReclaimed, item.work_item, "lost", stage)',
            "0",
        ),
    ],
    "heartbeats not counted": [
        SourceEdit(
            "item_requests:HeartbeatSender",
            "self._observe(HeartbeatFinished, lease.item, decision.result, attempt.lag)",
            "0",
        ),
    ],
    "requests to stop not counted": [
        SourceEdit(
            "session_runner:SessionRunner",
            "self._context.observe(StopRequested, item.work_item)",
            "0",
        ),
    ],
    "a lost run does not count": [
        SourceEdit(
            "attempt_number:AttemptNumber", "redelivered and RELEASED not in metadata", "False"
        ),
    ],
    "a release counts": [
        SourceEdit(
            "attempt_number:AttemptNumber",
            "redelivered and RELEASED not in metadata",
            "redelivered",
        ),
    ],
    "mark not deleted by the next run": [
        SourceEdit(
            "attempt_number:AttemptNumber",
            "(OUR_ERROR, RELEASED, RETRIES)",
            "(OUR_ERROR, RETRIES)",
        ),
    ],
    "release without a mark": [
        SourceEdit(
            "attempt_number:AttemptNumber",
            "self._deletions | self._number_patch | {RELEASED: reason}",
            "{}",
        ),
    ],
    "mark left beside the error": [
        SourceEdit("attempt_number:AttemptNumber", "{**self._deletions, **notes}", "{**notes}"),
    ],
}


@contextmanager
def apply_mutation(edits: list[SourceEdit]) -> Iterator[None]:
    """Apply the edits of a mutation to the pool's code until the end of the block."""
    with ExitStack() as stack:
        for edit in edits:
            module_name, _, class_name = edit.where.partition(":")
            module = importlib.import_module(_full_module_name(module_name))
            owner = getattr(module, class_name)
            name, original = _find_edited_function(owner, edit)
            setattr(owner, name, _compile_edited_function(module, original, edit))
            stack.callback(setattr, owner, name, original)
        yield


def _full_module_name(module: str) -> str:
    if module.startswith("workpool"):
        return module
    return f"workpool.{module}" if "." in module else f"workpool.pool.{module}"


def _find_edited_function(owner: type, edit: SourceEdit) -> tuple[str, Any]:
    """Return the method, with its name, whose source contains the text that `edit` replaces."""
    holders = [
        (name, member)
        for name, member in owner.__dict__.items()
        if inspect.isfunction(_unwrap_property(member))
        and _read_source(member).count(edit.old) == 1
    ]
    assert len(holders) == 1, f"{len(holders)} functions of {edit.where} hold {edit.old!r} once"
    return holders[0]


def _unwrap_property(member: Any) -> Any:
    return member.fget if isinstance(member, property) else member


def _read_source(member: Any) -> str:
    function = _unwrap_property(member)
    if (source := getattr(function, "mutated_source", None)) is not None:
        return str(source)
    try:
        return textwrap.dedent(inspect.getsource(function))
    except OSError:  # a method that `dataclass` generated has no source
        return ""


def _compile_edited_function(module: Any, original: Any, edit: SourceEdit) -> Any:
    source = _read_source(original).replace(edit.old, edit.new)
    made: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + source, f"<mutated {module}>", "exec")
    exec(code, module.__dict__, made)  # noqa: S102 - our own source, edited
    del made["annotations"]
    (member,) = made.values()
    _unwrap_property(member).mutated_source = source
    return member


def find_invariant_violations(seed: int) -> list[str]:
    """Simulate a seed's schedule; an exception of the mutated pool counts as a violation."""
    try:
        _, violations = simulate_schedule(generate_schedule_for_seed(seed))
    except BaseExceptionGroup as group:
        return [f"crash: {group.exceptions[0]!r}"]
    return violations


def find_invariants_that_catch_mutation(
    edits: list[SourceEdit],
    seeds: range,
    find: Callable[[int], list[str]] = find_invariant_violations,
) -> tuple[int, list[str]] | None:
    """Return the number of schedules up to the first violation, and the violated invariants.

    Return None if no schedule violates an invariant, so that the mutation survives.
    """
    with apply_mutation(edits):
        for count, seed in enumerate(seeds, 1):
            if violations := find(seed):
                return count, sorted({each.partition(":")[0] for each in violations})
    return None


def report_mutations(
    mutations: Mapping[str, list[SourceEdit]],
    seeds: range,
    find: Callable[[int], list[str]] = find_invariant_violations,
) -> int:
    """Print the invariants that caught each mutation; return how many mutations survived."""
    survived = 0
    for name, edits in mutations.items():
        found = find_invariants_that_catch_mutation(edits, seeds, find)
        survived += found is None
        text = "SURVIVED" if found is None else f"{found[0]:5d}  {', '.join(found[1])}"
        sys.stdout.write(f"{name:40s} {text}\n")
        sys.stdout.flush()
    return survived


def main() -> int:
    words = sys.argv[1:]
    wanted = {
        name: edits
        for name, edits in MUTATIONS.items()
        if not words or any(word in name for word in words)
    }
    return report_mutations(wanted, range(LIMIT))


if __name__ == "__main__":
    sys.exit(main())
