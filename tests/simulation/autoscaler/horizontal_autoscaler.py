"""The rules by which Kubernetes and KEDA choose a number of pods, as functions without I/O.

`HorizontalAutoscaler` is the HorizontalPodAutoscaler (`autoscaling/v2`) with one external metric
and a target average value. `KedaScaler` is the part of KEDA that starts the first pod and
removes the last one. Times are in seconds, on any clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class ScalingPolicy(NamedTuple):
    """The maximum number or percentage of pods added or removed within any `period` seconds."""

    kind: Literal["Pods", "Percent"]
    value: int
    period: float


class ScalingRules(NamedTuple):
    """The rules for scaling in one direction, up or down.

    Attributes:
        window: Seconds of the stabilization window.
        select: The policy that counts: the one with the largest or the smallest change; `Disabled`
            allows no change.
    """

    window: float
    policies: tuple[ScalingPolicy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"


SCALE_UP: Final = ScalingRules(
    0.0, (ScalingPolicy("Percent", 100, 15.0), ScalingPolicy("Pods", 4, 15.0))
)
"""The default of Kubernetes."""
SCALE_DOWN: Final = ScalingRules(300.0, (ScalingPolicy("Percent", 100, 15.0),))
"""The default of Kubernetes."""


@dataclass(frozen=True, slots=True)
class AutoscalerSpec:
    """The specification of a HorizontalPodAutoscaler.

    Attributes:
        target: The target average value of the metric for each pod.
        minimum: The smallest number of pods.
        maximum: The largest number of pods.
        tolerance: The distance of the ratio of metric and target from 1 that changes nothing.
    """

    target: float
    minimum: int
    maximum: int
    up: ScalingRules = SCALE_UP
    down: ScalingRules = SCALE_DOWN
    tolerance: float = 0.1


class HorizontalAutoscaler:
    """A HorizontalPodAutoscaler with its recent recommendations and changes."""

    def __init__(self, rules: AutoscalerSpec) -> None:
        self._rules = rules
        self._recommended: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []

    def compute_replicas_at_sync(
        self, now: float, replicas: int, pods: int, metric: float | None
    ) -> int:
        """Return the number of pods that the scaled workload should have.

        Args:
            now: The time.
            replicas: The number that the target has in its specification.
            pods: The number of its pods that are not being deleted.
            metric: The metric; None if it cannot be read, which changes nothing.
        """
        rules = self._rules
        if replicas == 0 and rules.minimum != 0:
            return 0  # with 0 replicas, Kubernetes switches the autoscaler off
        if not rules.minimum <= replicas <= rules.maximum:
            desired = min(rules.maximum, max(rules.minimum, replicas))
        elif metric is None:
            return replicas
        else:
            wanted = _pods_required_by_metric(metric, pods, rules)
            desired = self._limit_change_of_replicas(
                now, replicas, self._stabilize_recommendation(now, replicas, wanted)
            )
        if desired != replicas:
            self._changes.append((now, desired - replicas))
        return desired

    def _stabilize_recommendation(self, now: float, replicas: int, wanted: int) -> int:
        """Limit the change of the number of pods by the recent recommendations.

        `wanted` is the new recommendation, which is stored for later calls.
        """
        up, down = self._rules.up.window, self._rules.down.window
        lowest = min([wanted, *(each for at, each in self._recommended if at > now - up)])
        highest = max([wanted, *(each for at, each in self._recommended if at > now - down)])
        self._recommended = [each for each in self._recommended if each[0] > now - max(up, down)]
        self._recommended.append((now, wanted))
        return min(max(replicas, lowest), highest)

    def _limit_change_of_replicas(self, now: float, replicas: int, desired: int) -> int:
        """Limit the number of pods by the minimum, the maximum and the scaling policies."""
        rules = self._rules
        if desired > replicas:
            allowed = max(
                replicas,
                self._replicas_that_policies_allow(
                    now, replicas, rules.up, _increase_replicas_by_policy
                ),
            )
            return min(desired, allowed, rules.maximum)
        if desired < replicas:
            allowed = min(
                replicas,
                self._replicas_that_policies_allow(
                    now, replicas, rules.down, _decrease_replicas_by_policy
                ),
            )
            return max(desired, allowed, rules.minimum)
        return desired

    def _replicas_that_policies_allow(
        self,
        now: float,
        replicas: int,
        rules: ScalingRules,
        changed: Callable[[int, ScalingPolicy], int],
    ) -> int:
        if rules.select == "Disabled":
            return replicas
        proposals = [
            changed(replicas - self._replica_change_within_period(now, policy.period), policy)
            for policy in rules.policies
        ]
        largest_number = (rules.select == "Max") == (changed is _increase_replicas_by_policy)
        return max(proposals) if largest_number else min(proposals)

    def _replica_change_within_period(self, now: float, period: float) -> int:
        return sum(change for at, change in self._changes if at > now - period)


def _pods_required_by_metric(metric: float, pods: int, rules: AutoscalerSpec) -> int:
    """Return the number of pods for a metric, or `pods` if the metric is within the tolerance."""
    capacity = rules.target * pods
    if capacity and abs(1.0 - metric / capacity) <= rules.tolerance:
        return pods
    return math.ceil(metric / rules.target)


def _increase_replicas_by_policy(replicas: int, policy: ScalingPolicy) -> int:
    if policy.kind == "Pods":
        return replicas + policy.value
    return math.ceil(replicas * (100 + policy.value) / 100)


def _decrease_replicas_by_policy(replicas: int, policy: ScalingPolicy) -> int:
    if policy.kind == "Pods":
        return replicas - policy.value
    return replicas * (100 - policy.value) // 100


class KedaScaler:
    """The part of KEDA that starts the first pod and removes the last one.

    Args:
        minimum: `minReplicaCount`; with 0, all pods are removed without work.
        cooldown: `cooldownPeriod`: seconds from the last activity until they are removed.
    """

    def __init__(self, minimum: int, cooldown: float) -> None:
        self._minimum = minimum
        self._cooldown = cooldown
        self._active_at = -math.inf

    def compute_replicas_after_poll(self, now: float, replicas: int, metric: float | None) -> int:
        """Return the number of pods that KEDA wants, after it has polled the metric.

        Args:
            now: The time.
            replicas: The number that the target has in its specification.
            metric: The metric, which is active above 0; None if it cannot be read.
        """
        if metric is None:
            return replicas
        if metric > 0:
            self._active_at = now
            return replicas or max(1, self._minimum)
        if self._minimum == 0 and now - self._active_at > self._cooldown:
            return 0
        return max(replicas, self._minimum)
