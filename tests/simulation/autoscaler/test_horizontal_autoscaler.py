"""Tests of the autoscaler's rules with the examples of the documentation of Kubernetes and KEDA."""

from __future__ import annotations

import pytest

from tests.simulation.autoscaler.horizontal_autoscaler import (
    SCALE_DOWN,
    SCALE_UP,
    AutoscalerSpec,
    HorizontalAutoscaler,
    KedaScaler,
    ScalingPolicy,
    ScalingRules,
)

FOUR_OR_TENTH = (ScalingPolicy("Pods", 4, 60.0), ScalingPolicy("Percent", 10, 60.0))
AT_ONCE = ScalingRules(0.0, SCALE_DOWN.policies)


def make_autoscaler(
    target: float = 1.0,
    minimum: int = 1,
    maximum: int = 100,
    up: ScalingRules = SCALE_UP,
    down: ScalingRules = AT_ONCE,
) -> HorizontalAutoscaler:
    return HorizontalAutoscaler(AutoscalerSpec(target, minimum, maximum, up, down))


@pytest.mark.parametrize(
    ("target", "average", "pods", "desired"),
    [
        (100, 200, 2, 4),  # the metric is twice the target, so twice as many pods are needed
        (100, 50, 2, 1),  # the metric is half the target, so half as many pods are needed
        (75, 90, 50, 60),
        (100, 109, 50, 50),  # the ratio 1.09 is within the tolerance of 0.1
        (100, 91, 50, 50),
        (100, 89, 50, 45),
        (100, 101, 1, 1),
        (100, 120, 1, 2),  # 1.2 times one pod is rounded up to 2 pods
    ],
)
def test_number_of_pods_is_scaled_with_metric_unless_ratio_is_within_tolerance(
    target: float, average: float, pods: int, desired: int
) -> None:
    assert (
        make_autoscaler(target=target).compute_replicas_at_sync(0.0, pods, pods, average * pods)
        == desired
    )


def test_unreadable_metric_does_not_change_number_of_pods() -> None:
    assert make_autoscaler().compute_replicas_at_sync(0.0, 7, 7, None) == 7


def test_number_of_pods_outside_limits_is_corrected_even_without_metric() -> None:
    assert make_autoscaler(minimum=2, maximum=5).compute_replicas_at_sync(0.0, 9, 9, None) == 5
    assert make_autoscaler(minimum=2, maximum=5).compute_replicas_at_sync(0.0, 1, 1, None) == 2


def test_autoscaler_starts_no_pod_if_replicas_are_zero() -> None:
    assert make_autoscaler().compute_replicas_at_sync(0.0, 0, 0, 50.0) == 0


def test_scale_down_from_eighty_pods_uses_the_policy_that_removes_most() -> None:
    """The policies allow 4 pods or 10 % a minute, as in the documentation of Kubernetes.

    From 80 pods, 8 are removed in each of the first two minutes. From 40 pods on, it is 4 a minute.
    """
    scaler = make_autoscaler(minimum=10, down=ScalingRules(0.0, FOUR_OR_TENTH))
    numbers = [80]
    for minute in range(20):
        numbers.append(
            scaler.compute_replicas_at_sync(minute * 61.0, numbers[-1], numbers[-1], 10.0)
        )
    assert numbers[:3] == [80, 72, 64]
    below = numbers[next(i for i, each in enumerate(numbers) if each <= 40) :]
    assert below[:3] == [below[0], below[0] - 4, below[0] - 8]
    assert numbers[-1] == 10


def test_policy_of_four_pods_a_minute_removes_at_most_four_pods_in_a_minute() -> None:
    scaler = make_autoscaler(down=ScalingRules(0.0, (ScalingPolicy("Pods", 4, 60.0),)))
    assert scaler.compute_replicas_at_sync(0.0, 20, 20, 1.0) == 16
    assert scaler.compute_replicas_at_sync(15.0, 16, 16, 1.0) == 16
    assert scaler.compute_replicas_at_sync(59.0, 16, 16, 1.0) == 16
    assert scaler.compute_replicas_at_sync(61.0, 16, 16, 1.0) == 12


def test_scale_down_with_select_policy_min_uses_the_smallest_change() -> None:
    """The documentation of Kubernetes gives this example: at most 10 % and 5 pods a minute."""
    policies = (ScalingPolicy("Percent", 10, 60.0), ScalingPolicy("Pods", 5, 60.0))
    assert (
        make_autoscaler(down=ScalingRules(0.0, policies, "Min")).compute_replicas_at_sync(
            0.0, 80, 80, 1.0
        )
        == 75
    )
    assert (
        make_autoscaler(down=ScalingRules(0.0, policies, "Min")).compute_replicas_at_sync(
            0.0, 20, 20, 1.0
        )
        == 18
    )


def test_disabled_scale_down_removes_no_pods() -> None:
    down = ScalingRules(0.0, SCALE_DOWN.policies, "Disabled")
    assert make_autoscaler(down=down).compute_replicas_at_sync(0.0, 20, 20, 1.0) == 20


def test_scale_up_doubles_or_adds_four_pods_every_fifteen_seconds() -> None:
    scaler = make_autoscaler()
    assert scaler.compute_replicas_at_sync(0.0, 1, 1, 100.0) == 5
    assert scaler.compute_replicas_at_sync(14.0, 5, 5, 100.0) == 5
    assert scaler.compute_replicas_at_sync(15.1, 5, 5, 100.0) == 10
    assert scaler.compute_replicas_at_sync(30.2, 10, 10, 100.0) == 20


def test_scale_down_uses_highest_recommendation_of_the_last_five_minutes() -> None:
    scaler = make_autoscaler(down=SCALE_DOWN)
    assert scaler.compute_replicas_at_sync(0.0, 10, 10, 10.0) == 10
    assert scaler.compute_replicas_at_sync(15.0, 10, 10, 4.0) == 10
    assert scaler.compute_replicas_at_sync(299.0, 10, 10, 2.0) == 10
    assert scaler.compute_replicas_at_sync(301.0, 10, 10, 2.0) == 4
    assert scaler.compute_replicas_at_sync(316.0, 4, 4, 2.0) == 2


def test_stabilization_window_of_scale_down_does_not_delay_scale_up() -> None:
    scaler = make_autoscaler(down=SCALE_DOWN)
    assert scaler.compute_replicas_at_sync(0.0, 4, 4, 4.0) == 4
    assert scaler.compute_replicas_at_sync(15.0, 4, 4, 8.0) == 8


def test_number_of_pods_is_unchanged_if_metric_is_within_tolerance_of_target() -> None:
    assert make_autoscaler().compute_replicas_at_sync(0.0, 11, 11, 10.0) == 11
    assert make_autoscaler().compute_replicas_at_sync(0.0, 9, 9, 8.0) == 8


def test_keda_with_work_runs_at_least_one_pod_and_at_least_the_minimum() -> None:
    assert KedaScaler(0, 300.0).compute_replicas_after_poll(0.0, 0, 1.0) == 1
    assert KedaScaler(3, 300.0).compute_replicas_after_poll(0.0, 0, 1.0) == 3
    assert KedaScaler(0, 300.0).compute_replicas_after_poll(0.0, 6, 1.0) == 6


def test_keda_removes_all_pods_after_cooldown_since_last_activity() -> None:
    keda = KedaScaler(0, 300.0)
    assert keda.compute_replicas_after_poll(0.0, 5, 2.0) == 5
    assert keda.compute_replicas_after_poll(15.0, 5, 0.0) == 5
    assert keda.compute_replicas_after_poll(300.0, 5, 0.0) == 5
    assert keda.compute_replicas_after_poll(315.0, 5, 0.0) == 0


def test_keda_removes_no_pods_while_the_metric_cannot_be_read() -> None:
    keda = KedaScaler(0, 300.0)
    assert keda.compute_replicas_after_poll(0.0, 5, 2.0) == 5
    assert keda.compute_replicas_after_poll(1000.0, 5, None) == 5


def test_keda_keeps_the_minimum_of_two_pods_without_work() -> None:
    keda = KedaScaler(2, 300.0)
    assert keda.compute_replicas_after_poll(0.0, 2, 1.0) == 2
    assert keda.compute_replicas_after_poll(1000.0, 2, 0.0) == 2
