"""Tests of the autoscaler's rules with the examples of the documentation of Kubernetes and KEDA."""

from __future__ import annotations

import pytest

from tests.simulation.autoscaler.horizontal_autoscaler import (
    SCALE_DOWN,
    SCALE_UP,
    AutoscalerSpec,
    HorizontalAutoscaler,
    KedaActivation,
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
        (100, 200, 2, 4),  # twice the target doubles the number of pods
        (100, 50, 2, 1),  # half the target halves the number of pods
        (75, 90, 50, 60),
        (100, 109, 50, 50),  # 1.09 times the target is within the tolerance of 0.1
        (100, 91, 50, 50),
        (100, 89, 50, 45),
        (100, 101, 1, 1),
        (100, 120, 1, 2),  # 1.2 pods are rounded up to 2
    ],
)
def test_number_of_pods_follows_ratio_of_average_and_target_outside_of_tolerance(
    target: float, average: float, pods: int, desired: int
) -> None:
    assert (
        make_autoscaler(target=target).sync_target_size(0.0, pods, pods, average * pods) == desired
    )


def test_metric_that_cannot_be_read_changes_nothing() -> None:
    assert make_autoscaler().sync_target_size(0.0, 7, 7, None) == 7


def test_number_of_pods_outside_of_limits_is_corrected_without_metric() -> None:
    assert make_autoscaler(minimum=2, maximum=5).sync_target_size(0.0, 9, 9, None) == 5
    assert make_autoscaler(minimum=2, maximum=5).sync_target_size(0.0, 1, 1, None) == 2


def test_autoscaler_of_workload_without_pods_starts_none() -> None:
    assert make_autoscaler().sync_target_size(0.0, 0, 0, 50.0) == 0


def test_scale_down_from_eighty_to_ten_pods_takes_the_larger_policy_each_minute() -> None:
    """The documentation gives this example: 8 of 80, then 8 of 72; below 40 pods, 4 at a time."""
    scaler = make_autoscaler(minimum=10, down=ScalingRules(0.0, FOUR_OR_TENTH))
    numbers = [80]
    for minute in range(20):
        numbers.append(scaler.sync_target_size(minute * 61.0, numbers[-1], numbers[-1], 10.0))
    assert numbers[:3] == [80, 72, 64]
    below = numbers[next(i for i, each in enumerate(numbers) if each <= 40) :]
    assert below[:3] == [below[0], below[0] - 4, below[0] - 8]
    assert numbers[-1] == 10


def test_scaling_policy_at_its_limit_allows_no_change_until_period_ends() -> None:
    scaler = make_autoscaler(down=ScalingRules(0.0, (ScalingPolicy("Pods", 4, 60.0),)))
    assert scaler.sync_target_size(0.0, 20, 20, 1.0) == 16
    assert scaler.sync_target_size(15.0, 16, 16, 1.0) == 16
    assert scaler.sync_target_size(59.0, 16, 16, 1.0) == 16
    assert scaler.sync_target_size(61.0, 16, 16, 1.0) == 12


def test_smallest_policy_limits_scale_down_if_selected() -> None:
    """The documentation gives this example: at most 10 % a minute, and no more than 5 pods."""
    policies = (ScalingPolicy("Percent", 10, 60.0), ScalingPolicy("Pods", 5, 60.0))
    assert (
        make_autoscaler(down=ScalingRules(0.0, policies, "Min")).sync_target_size(0.0, 80, 80, 1.0)
        == 75
    )
    assert (
        make_autoscaler(down=ScalingRules(0.0, policies, "Min")).sync_target_size(0.0, 20, 20, 1.0)
        == 18
    )


def test_disabled_scale_down_removes_nothing() -> None:
    down = ScalingRules(0.0, SCALE_DOWN.policies, "Disabled")
    assert make_autoscaler(down=down).sync_target_size(0.0, 20, 20, 1.0) == 20


def test_scale_up_doubles_or_adds_four_pods_every_fifteen_seconds() -> None:
    scaler = make_autoscaler()
    assert scaler.sync_target_size(0.0, 1, 1, 100.0) == 5
    assert scaler.sync_target_size(14.0, 5, 5, 100.0) == 5
    assert scaler.sync_target_size(15.1, 5, 5, 100.0) == 10
    assert scaler.sync_target_size(30.2, 10, 10, 100.0) == 20


def test_scale_down_window_uses_highest_recommendation_of_five_minutes() -> None:
    scaler = make_autoscaler(down=SCALE_DOWN)
    assert scaler.sync_target_size(0.0, 10, 10, 10.0) == 10
    assert scaler.sync_target_size(15.0, 10, 10, 4.0) == 10
    assert scaler.sync_target_size(299.0, 10, 10, 2.0) == 10
    assert scaler.sync_target_size(301.0, 10, 10, 2.0) == 4
    assert scaler.sync_target_size(316.0, 4, 4, 2.0) == 2


def test_scale_down_window_does_not_delay_scale_up() -> None:
    scaler = make_autoscaler(down=SCALE_DOWN)
    assert scaler.sync_target_size(0.0, 4, 4, 4.0) == 4
    assert scaler.sync_target_size(15.0, 4, 4, 8.0) == 8


def test_metric_within_tolerance_keeps_eleven_pods_although_ten_suffice() -> None:
    assert make_autoscaler().sync_target_size(0.0, 11, 11, 10.0) == 11
    assert make_autoscaler().sync_target_size(0.0, 9, 9, 8.0) == 8


def test_first_work_starts_at_least_the_minimum_of_pods() -> None:
    assert KedaActivation(0, 300.0).poll_target_size(0.0, 0, 1.0) == 1
    assert KedaActivation(3, 300.0).poll_target_size(0.0, 0, 1.0) == 3
    assert KedaActivation(0, 300.0).poll_target_size(0.0, 6, 1.0) == 6


def test_all_pods_are_removed_after_cooldown_since_last_activity() -> None:
    keda = KedaActivation(0, 300.0)
    assert keda.poll_target_size(0.0, 5, 2.0) == 5
    assert keda.poll_target_size(15.0, 5, 0.0) == 5
    assert keda.poll_target_size(300.0, 5, 0.0) == 5
    assert keda.poll_target_size(315.0, 5, 0.0) == 0


def test_pods_are_not_removed_while_the_metric_cannot_be_read() -> None:
    keda = KedaActivation(0, 300.0)
    assert keda.poll_target_size(0.0, 5, 2.0) == 5
    assert keda.poll_target_size(1000.0, 5, None) == 5


def test_minimum_above_zero_is_kept_without_work() -> None:
    keda = KedaActivation(2, 300.0)
    assert keda.poll_target_size(0.0, 2, 1.0) == 2
    assert keda.poll_target_size(1000.0, 2, 0.0) == 2
