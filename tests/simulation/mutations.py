"""Mistakes that the pool could have made: each one is put in, and the simulation must catch it.

A mutation rewrites lines of a function. One whose lines are not there any more is an error, so the
list cannot rot. As a script, it prints what caught each, and after how many schedules.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from workpool.testing.simulation.run import schedule_of, simulate

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 2000


class Edit(NamedTuple):
    """`old`, which one function of `module:Class` holds once, becomes `new`."""

    where: str
    old: str
    new: str


MUTATIONS: dict[str, list[Edit]] = {
    "no dedupe": [
        Edit("dispatch:Dispatcher", "owned = self.owned.get(item.id)", "owned = None"),
        # Else the second line of defence holds: an item of a session that runs is declined.
        Edit("dispatch:Dispatcher", "item.session_id in self._taken", "False"),
        Edit(
            "dispatch:Dispatcher",
            "del self.owned[claim.item.id]",
            "self.owned.pop(claim.item.id, None)",
        ),
    ],
    "two items of one session": [
        Edit("dispatch:Dispatcher", "item.session_id in self._taken", "False"),
    ],
    "412 taken for lost": [
        Edit(
            "lease:Lease",
            "doubted=self._unanswered or self._lent",
            "doubted=False",
        )
    ],
    "loss ignored": [Edit("serve:Serving", "self.handling.cancel(claim, Cause.LOST)", "0")],
    "finish without a held lease": [
        Edit("claim:Claim", "lent or not self.lease.held", "lent"),
    ],
    "stop after loss": [
        Edit("claim:Claim", "lent or not self.lease.held", "lent"),
        Edit("finish:Finisher", 'if row.item == "untouched":', "if False:"),
    ],
    "metadata after loss": [
        Edit("claim:Claim", "self.check_lease()", "pass"),
        Edit("serve:Serving", "self.handling.cancel(claim, Cause.LOST)", "0"),
    ],
    "beat after loss": [
        Edit("lease:Lease", 'if self.fate == "held" and self._pulse.clock() >=', "if 0 >"),
    ],
    "more acked than slots": [
        Edit("queue:BoundedQueue", " or self.running >= self.concurrency", ""),
    ],
    "poll before reserving": [
        Edit(
            "queue:BoundedQueue",
            "if self._free() > 0 and not self._reservers:",
            "if True:",
        ),
    ],
    "drain that cancels heartbeats": [
        Edit(
            "dispatch:Dispatcher",
            "claim.session.interrupt(draining=True)",
            "claim.session.interrupt(draining=True); self._parts.keeper.end(claim.lease)",
        ),
    ],
    "deadline from receipt": [
        Edit(
            "lease:Lease",
            "self.deadline = sent.at + beat.ttl_seconds",
            "self.deadline = self._pulse.clock() + beat.ttl_seconds",
        ),
    ],
    "two supervisors under one Worker-ID": [
        Edit("supervisor:Supervisor", "-{secrets.token_hex(4)}", ""),
    ],
    "own stop taken for an operator's": [
        Edit("finish:Finisher", "lease.own_stop, True", "lease.own_stop, False"),
    ],
    "handler before the first beat": [
        Edit(
            "serve:Serving",
            "await claim.until(lambda: lease.settled or self.draining, lease.remaining)",
            "pass",
        ),
        Edit("serve:Serving", "(lease.held and lease.begun)", "lease.held"),
    ],
    "lease not cut by an unanswered beat": [
        Edit(
            "lease:Lease",
            "self.deadline, self._ttl = min(self.deadline, at + ttl), min(self._ttl, ttl)",
            "pass",
        ),
    ],
    "finish not awaited": [
        Edit("drain:Drain", "await asyncio.wait(tasks, timeout=AFTER_DEADLINE_SECONDS)", "pass"),
    ],
    "id given up at the cancel": [
        Edit(
            "handling:Handling",
            "await ended(running)",
            'lost = asyncio.ensure_future(claim.until(lambda: claim.lease.fate != "held"))\n'
            '        await asyncio.wait({running, lost}, return_when="FIRST_COMPLETED")\n'
            "        lost.cancel()\n"
            "        if not running.done():\n"
            "            return",
        ),
    ],
    "ack's 409 ignored": [
        Edit("acknowledge:Acknowledger", 'return "conflict"', 'return "ok"'),
    ],
    "drained is stopped": [
        Edit(
            "finish:Finisher",
            "row = TABLE[max(claim.causes)]",
            "row = TABLE[max(claim.causes - {Cause.DRAINED}, default=Cause.RETURNED)]",
        ),
    ],
    "released by silence": [
        Edit("finish:Finisher", "self._keeper.release(claim.lease, delay)", "0"),
    ],
    "no margin before the deadline": [
        Edit(
            "lease:Lease",
            "self.deadline - max(MARGIN_SECONDS, self._ttl / MARGIN_PART)",
            "self.deadline",
        ),
    ],
    "unwritten taken for written": [
        Edit("finish:Finisher", 'return "released"', "return row.outcome"),
    ],
    "beating after the handover": [
        Edit("handover:Handover", "looking = True", "looking = False"),
    ],
    "a child's beat taken for our own": [
        Edit("lease:Lease", "self._expected if self._lent else None", "None"),
    ],
    "finish before the handover is settled": [
        Edit("serve:Serving", "await settle(claim)", "pass"),
        Edit("claim:Claim", "lent or not self.lease.held", "not self.lease.held"),
    ],
    "no child, and the item not taken back": [
        Edit("handover:Handover", "held = await lease.beat()", "held = True"),
    ],
    "a child that does not expect its parent's beat": [
        Edit("dispatch:Dispatcher", "keeper, changed, adopted)", "keeper, changed)"),
    ],
    "items not counted": [
        Edit(
            "dispatch:Dispatcher", "self._parts.observe(ItemClaimed(item, origin, _age(item)))", "0"
        ),
    ],
    "reclaims not counted": [
        Edit(
            "dispatch:Dispatcher",
            'self._parts.observe(ItemReclaimed(item, "gained", "poll"))',
            "0",
        ),
    ],
    "losses not counted": [
        Edit("serve:Serving", 'self._parts.observe(ItemReclaimed(claim.item, "lost", stage))', "0"),
    ],
    "beats not counted": [Edit("lease:Lease", 'self._observe("ok", sent.lag)', "0")],
    "requests to stop not counted": [
        Edit("serve:Serving", "self._parts.observe(StopRequested(claim.item))", "0"),
    ],
    "a lost run does not count": [
        Edit("attempt:Attempt", "redelivered and RELEASED not in metadata", "False"),
    ],
    "a release counts": [
        Edit("attempt:Attempt", "redelivered and RELEASED not in metadata", "redelivered"),
    ],
    "mark not deleted by the next run": [
        Edit("attempt:Attempt", "for key in (ERROR, RELEASED)", "for key in (ERROR,)"),
    ],
    "release without a mark": [
        Edit("attempt:Attempt", "self._notes | self._number | {RELEASED: reason}", "{}"),
    ],
    "mark left beside the error": [
        Edit("attempt:Attempt", "{**self._notes, **notes}", "{**notes}"),
    ],
    "sleep not noticed": [
        Edit("keeper:Keeper", "lease.expire()", "pass"),
        Edit("lease:Lease", "self._pulse.clock() < self.deadline", "True"),
    ],
}


@contextmanager
def mutated(edits: list[Edit]) -> Iterator[None]:
    """The pool with the edits, until the end of the block."""
    with ExitStack() as stack:
        for edit in edits:
            module_name, _, class_name = edit.where.partition(":")
            module = importlib.import_module(f"workpool.pool.{module_name}")
            owner = getattr(module, class_name)
            name, original = _found(owner, edit)
            setattr(owner, name, _rewritten(module, original, edit))
            stack.callback(setattr, owner, name, original)
        yield


def _found(owner: type, edit: Edit) -> tuple[str, Any]:
    """The one function that the edit is for."""
    holders = [
        (name, member)
        for name, member in owner.__dict__.items()
        if inspect.isfunction(_function(member)) and _source(member).count(edit.old) == 1
    ]
    assert len(holders) == 1, f"{len(holders)} functions of {edit.where} hold {edit.old!r} once"
    return holders[0]


def _function(member: Any) -> Any:
    return member.fget if isinstance(member, property) else member


def _source(member: Any) -> str:
    function = _function(member)
    return getattr(function, "mutated", None) or textwrap.dedent(inspect.getsource(function))


def _rewritten(module: Any, original: Any, edit: Edit) -> Any:
    source = _source(original).replace(edit.old, edit.new)
    made: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + source, f"<mutated {module}>", "exec")
    exec(code, module.__dict__, made)  # noqa: S102 - our own source, edited
    del made["annotations"]
    (member,) = made.values()
    _function(member).mutated = source
    return member


def hunt(edits: list[Edit], seeds: range) -> tuple[int, list[str]] | None:
    """How many schedules it takes to catch the mutation, and what caught it; None: nothing did."""
    with mutated(edits):
        for count, seed in enumerate(seeds, 1):
            try:
                _, words = simulate(schedule_of(seed))
            except BaseExceptionGroup as group:
                words = [f"crash: {group.exceptions[0]!r}"]
            if words:
                return count, sorted({each.partition(":")[0] for each in words})
    return None


def main() -> int:
    wanted = sys.argv[1:]
    survived = 0
    for name, edits in MUTATIONS.items():
        if wanted and not any(word in name for word in wanted):
            continue
        found = hunt(edits, range(LIMIT))
        survived += found is None
        words = "SURVIVED" if found is None else f"{found[0]:5d}  {', '.join(found[1])}"
        sys.stdout.write(f"{name:40s} {words}\n")
        sys.stdout.flush()
    return survived


if __name__ == "__main__":
    sys.exit(main())
