"""8. What counts as an attempt, by the metadata that every pool's calls left at the control plane.

A *spell* is one tenure of an item, or a parent's and its child's together: one attempt at most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from workpool.events import SessionFinished
from workpool.testing.simulation.trace import FOREVER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workpool.testing.simulation.case import Case, Tenure
    from workpool.testing.simulation.trace import Node, Run, Sent

_RELEASED: Final = "workpool.released"
_ERROR: Final = "workpool.error"
_NOTES: Final = frozenset({"workpool.attempt", _RELEASED, _ERROR})
_REFUSED: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


@dataclass(slots=True, eq=False, repr=False)
class _Spell:
    """One spell.

    Attributes:
        marked: Its end found a mark that it had left.
        refused: A write of its notes was refused, so that its number may be unknown to the next.
    """

    tenures: list[Tenure] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    marked: bool = False
    refused: bool = False


def attempts_are_counted(case: Case) -> Iterator[str]:
    """8a. A handler's number is 1, and 1 more per earlier run with neither a mark nor a stop.

    A spell that ended before its handler began may count, as may one whose own number was refused.
    """
    for work_id in case.runs:
        if _late(case, work_id):
            continue
        least = most = 1
        for spell in _spells(case, work_id):
            least -= spell.refused
            for run in spell.runs:
                if not least <= run.attempt <= most:
                    name = f"{run.node.machine.name}:{work_id[-6:]}@{run.started:.3f}"
                    yield f"{name} is attempt {run.attempt}, not {least} to {most}"
            if not spell.marked:
                most += 1
                least += bool(spell.runs)


def what_is_released_is_marked(case: Case) -> Iterator[str]:
    """8b. By a drain, too, and whatever the handler did; unless something befell its pool."""
    for work_id in case.runs:
        for spell in _spells(case, work_id):
            tenure = spell.tenures[-1]
            node = _node_of(case, tenure)
            if spell.marked or tenure.stop_wished < FOREVER or case.disturbed(node, tenure):
                continue
            if _released(node, tenure):
                yield f"{work_id} was released by {node.machine.name} and not marked"


def no_mark_stands_beside_an_error(case: Case) -> Iterator[str]:
    """8c. Unless a write overtook an earlier one on its way."""
    for work_id in case.runs:
        calls = _notes(case, work_id)
        if _late(case, work_id) or calls != sorted(calls, key=_at):
            continue
        standing: set[str] = set()
        for call in calls:
            standing -= call.patch.keys()
            standing |= {key for key, value in call.patch.items() if value is not None}
            if {_RELEASED, _ERROR} <= standing:
                yield f"{work_id} has a mark and an error since {call.arrives_at:.3f}"
                break


def _spells(case: Case, work_id: str) -> list[_Spell]:
    spells: list[_Spell] = []
    for tenure in case.tenures.get(work_id, ()):
        if not spells or spells[-1].tenures[-1].how != "detached":
            spells.append(_Spell())
        _add(case, spells[-1], tenure)
    return spells


def _add(case: Case, spell: _Spell, tenure: Tenure) -> None:
    node = _node_of(case, tenure)
    spell.tenures.append(tenure)
    spell.runs += [
        run
        for run in case.runs[tenure.work_id]
        if run.node is node and case.tenure(node, tenure.work_id, run.started) is tenure
    ]
    spell.refused |= any(
        call.answer in _REFUSED and call.patch.keys() & _NOTES
        for call in case.sent[node, tenure.work_id]
        if case.tenure(node, tenure.work_id, call.at) is tenure
    )
    for call in _notes(case, tenure.work_id):
        if call.node is node and case.tenure(node, tenure.work_id, call.at) is tenure:
            spell.marked = call.patch.get(_RELEASED, spell.marked or None) is not None


def _notes(case: Case, work_id: str) -> list[Sent]:
    """The item's notes in the order in which they were applied."""
    found = [
        call
        for (_, of_item), calls in case.sent.items()
        if of_item == work_id
        for call in calls
        if call.patch.keys() & _NOTES and call.arrives_at < FOREVER
    ]
    return sorted(found, key=lambda call: call.arrives_at)


def _late(case: Case, work_id: str) -> bool:
    """Whether a note was applied after its sender's tenure: nothing on the wire prevents that."""
    for call in _notes(case, work_id):
        tenure = case.tenure(call.node, work_id, call.at)
        if tenure is None or call.arrives_at > tenure.ended:
            return True
    return False


def _released(node: Node, tenure: Tenure) -> bool:
    return any(
        isinstance(event, SessionFinished)
        and event.session.item.id == tenure.work_id
        and event.outcome == "released"
        and tenure.began <= at <= tenure.ended
        for at, event in node.events
    )


def _node_of(case: Case, tenure: Tenure) -> Node:
    return next(node for node in case.trace.nodes if node.worker_id == tenure.worker_id)


def _at(call: Sent) -> float:
    return call.at
