"""Tests of the order in which a ReplicaSet deletes pods: a later rule decides only ties."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.simulation.autoscaler.replica_set import PodState, pods_to_delete

NOW = 100_000.0
POD = PodState("m", created=0.0, host="a", ready_since=1.0)
"""A pod that has been ready for a day."""

FIRST_AND_SECOND = {
    "unassigned before assigned": (
        replace(POD, host=None, cost=9),
        replace(POD, ready_since=None, cost=-9),
    ),
    "pending before running": (
        replace(POD, running=False, cost=9),
        replace(POD, ready_since=None, cost=-9),
    ),
    "not ready before ready, whatever the cost": (
        replace(POD, ready_since=None, cost=9),
        replace(POD, cost=0),
    ),
    "lower cost before higher cost, whatever the age": (
        replace(POD, cost=0),
        replace(POD, cost=1, ready_since=NOW - 1, created=NOW - 2),
    ),
    "ready for a shorter time before longer": (
        replace(POD, ready_since=NOW - 10, created=0.0),
        replace(POD, ready_since=NOW - 1000, created=NOW - 1001, restarts=5),
    ),
    "more restarts before fewer": (
        replace(POD, restarts=2),
        replace(POD, restarts=1, created=NOW - 2),
    ),
    "created later before earlier": (
        replace(POD, created=NOW - 10),
        replace(POD, created=0.0),
    ),
    "about the same age: by the random identity": (
        replace(POD, uid="a", ready_since=NOW - 600),
        replace(POD, uid="b", ready_since=NOW - 590),
    ),
}


@pytest.mark.parametrize("rule", FIRST_AND_SECOND)
def test_each_deletion_rule_decides_which_of_two_pods_replica_set_deletes(rule: str) -> None:
    first, second = FIRST_AND_SECOND[rule]
    assert pods_to_delete([first, second], 1, NOW) == [first]
    assert pods_to_delete([second, first], 1, NOW) == [first]


def test_pod_that_shares_its_node_is_deleted_before_pod_alone_on_its_node() -> None:
    alone = replace(POD, host="b", ready_since=NOW - 1)
    both = [replace(POD, uid="x"), replace(POD, uid="y")]
    assert pods_to_delete([alone, *both], 1, NOW)[0] in both


def test_deletion_cost_takes_precedence_over_number_of_pods_on_node() -> None:
    alone = replace(POD, host="b", cost=0)
    both = [replace(POD, uid="x", cost=1), replace(POD, uid="y", cost=1)]
    assert pods_to_delete([*both, alone], 1, NOW) == [alone]


def test_three_pods_with_lowest_deletion_cost_are_deleted_in_ascending_order() -> None:
    pods = [replace(POD, uid=str(cost), cost=cost) for cost in (3, 0, 2, 1)]
    assert [each.cost for each in pods_to_delete(pods, 3, NOW)] == [0, 1, 2]
