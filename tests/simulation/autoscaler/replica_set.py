"""The order in which a ReplicaSet deletes pods.

The rules are those of Kubernetes since 1.22, in their order. The times of readiness and creation
are compared by the logarithm of the age, so that pods of about the same age are deleted in a random
order.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cmp_to_key, partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class PodState:
    """One pod as the controller of the ReplicaSet sees it.

    Attributes:
        uid: A random text, which decides between pods of about the same age.
        created: The time of its creation.
        host: The node that it is assigned to; None: none.
        running: Its container has started; before that it is pending.
        ready_since: The time since which it is ready; None: it is not ready.
        cost: The annotation `controller.kubernetes.io/pod-deletion-cost`, 0 without one.
        restarts: The largest number of restarts of one of its containers.
    """

    uid: str
    created: float
    host: str | None = None
    running: bool = True
    ready_since: float | None = None
    cost: int = 0
    restarts: int = 0


def pods_to_delete(pods: Sequence[PodState], count: int, now: float) -> list[PodState]:
    """Return the `count` pods that the ReplicaSet deletes, in the order of their deletion.

    Args:
        pods: The pods that are not being deleted.
        count: The number of pods to delete.
        now: The time.
    """
    hosts = Counter(pod.host for pod in pods)
    order = partial(_compare_by_deletion_order, hosts, now)
    return sorted(pods, key=cmp_to_key(order))[:count]


def _compare_by_deletion_order(
    hosts: Counter[str | None], now: float, one: PodState, two: PodState
) -> int:
    """Return a number below 0 if `one` is deleted before `two`, and above 0 if after `two`."""
    ranks = _deletion_sort_key(hosts, one), _deletion_sort_key(hosts, two)
    if ranks[0] != ranks[1]:
        return -1 if ranks[0] < ranks[1] else 1
    first, second = one.ready_since, two.ready_since
    if first is not None and second is not None and first != second:
        return _compare_logarithms_of_ages(now, first, second) or _compare_uids(one, two)
    if one.restarts != two.restarts:
        return two.restarts - one.restarts
    if one.created != two.created:
        return _compare_logarithms_of_ages(now, one.created, two.created) or _compare_uids(one, two)
    return 0


def _deletion_sort_key(hosts: Counter[str | None], pod: PodState) -> tuple[int, ...]:
    """Return a pod's sort key by the first five of the rules of Kubernetes.

    The pod with the lowest key is deleted first.
    """
    return (
        pod.host is not None,
        pod.running,
        pod.ready_since is not None,
        pod.cost,
        -hosts[pod.host],  # of two pods, the one on the node with more pods is deleted first
    )


def _compare_logarithms_of_ages(now: float, one: float, two: float) -> int:
    return _logarithm_of_age(now - one) - _logarithm_of_age(now - two)


def _logarithm_of_age(age: float) -> int:
    """Return the base-2 logarithm of an age in nanoseconds, rounded down."""
    nanoseconds = age * 1e9
    return int(math.log2(nanoseconds)) if nanoseconds > 0 else -1


def _compare_uids(one: PodState, two: PodState) -> int:
    return -1 if one.uid < two.uid else 1
