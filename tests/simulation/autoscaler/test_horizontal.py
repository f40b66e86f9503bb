"""The rules of the autoscaler, with the figures of the documentation of Kubernetes and KEDA."""

from __future__ import annotations

import pytest

from tests.simulation.autoscaler.horizontal import (
    SCALE_DOWN,
    SCALE_UP,
    Activation,
    Autoscaling,
    HorizontalAutoscaler,
    Policy,
    ScalingRules,
)

FOUR_OR_TENTH = (Policy("Pods", 4, 60.0), Policy("Percent", 10, 60.0))
AT_ONCE = ScalingRules(0.0, SCALE_DOWN.policies)


def autoscaler(
    target: float = 1.0,
    minimum: int = 1,
    maximum: int = 100,
    up: ScalingRules = SCALE_UP,
    down: ScalingRules = AT_ONCE,
) -> HorizontalAutoscaler:
    return HorizontalAutoscaler(Autoscaling(target, minimum, maximum, up, down))


@pytest.mark.parametrize(
    ("target", "average", "pods", "desired"),
    [
        (100, 200, 2, 4),  # twice the target: the number is doubled
        (100, 50, 2, 1),  # half of it: the number is halved
        (75, 90, 50, 60),
        (100, 109, 50, 50),  # within the tolerance of 0.1
        (100, 91, 50, 50),
        (100, 89, 50, 45),
        (100, 101, 1, 1),
        (100, 120, 1, 2),  # rounded up
    ],
)
def test_number_of_pods_follows_ratio_of_average_and_target_outside_of_tolerance(
    target: float, average: float, pods: int, desired: int
) -> None:
    assert autoscaler(target=target).sync(0.0, pods, pods, average * pods) == desired


def test_metric_that_cannot_be_read_changes_nothing() -> None:
    assert autoscaler().sync(0.0, 7, 7, None) == 7


def test_number_outside_of_limits_is_corrected_without_metric() -> None:
    assert autoscaler(minimum=2, maximum=5).sync(0.0, 9, 9, None) == 5
    assert autoscaler(minimum=2, maximum=5).sync(0.0, 1, 1, None) == 2


def test_target_without_pods_is_left_alone() -> None:
    assert autoscaler().sync(0.0, 0, 0, 50.0) == 0


def test_scale_down_from_eighty_to_ten_pods_takes_the_larger_policy_each_minute() -> None:
    """The example of the documentation: 8, then 8 of 72; below 40 pods, 4 at a time."""
    scaler = autoscaler(minimum=10, down=ScalingRules(0.0, FOUR_OR_TENTH))
    numbers = [80]
    for minute in range(20):
        numbers.append(scaler.sync(minute * 61.0, numbers[-1], numbers[-1], 10.0))
    assert numbers[:3] == [80, 72, 64]
    below = numbers[next(i for i, each in enumerate(numbers) if each <= 40) :]
    assert below[:3] == [below[0], below[0] - 4, below[0] - 8]
    assert numbers[-1] == 10


def test_policy_counts_changes_of_its_period_only_once() -> None:
    scaler = autoscaler(down=ScalingRules(0.0, (Policy("Pods", 4, 60.0),)))
    assert scaler.sync(0.0, 20, 20, 1.0) == 16
    assert scaler.sync(15.0, 16, 16, 1.0) == 16
    assert scaler.sync(59.0, 16, 16, 1.0) == 16
    assert scaler.sync(61.0, 16, 16, 1.0) == 12


def test_smallest_policy_limits_scale_down_if_selected() -> None:
    """The example of the documentation: at most 10 % a minute, and no more than 5 pods."""
    policies = (Policy("Percent", 10, 60.0), Policy("Pods", 5, 60.0))
    assert autoscaler(down=ScalingRules(0.0, policies, "Min")).sync(0.0, 80, 80, 1.0) == 75
    assert autoscaler(down=ScalingRules(0.0, policies, "Min")).sync(0.0, 20, 20, 1.0) == 18


def test_disabled_scale_down_removes_nothing() -> None:
    down = ScalingRules(0.0, SCALE_DOWN.policies, "Disabled")
    assert autoscaler(down=down).sync(0.0, 20, 20, 1.0) == 20


def test_scale_up_doubles_or_adds_four_pods_every_fifteen_seconds() -> None:
    scaler = autoscaler()
    assert scaler.sync(0.0, 1, 1, 100.0) == 5
    assert scaler.sync(14.0, 5, 5, 100.0) == 5
    assert scaler.sync(15.1, 5, 5, 100.0) == 10
    assert scaler.sync(30.2, 10, 10, 100.0) == 20


def test_window_uses_highest_recommendation_of_five_minutes() -> None:
    scaler = autoscaler(down=SCALE_DOWN)
    assert scaler.sync(0.0, 10, 10, 10.0) == 10
    assert scaler.sync(15.0, 10, 10, 4.0) == 10
    assert scaler.sync(299.0, 10, 10, 2.0) == 10
    assert scaler.sync(301.0, 10, 10, 2.0) == 4
    assert scaler.sync(316.0, 4, 4, 2.0) == 2


def test_window_does_not_delay_scale_up() -> None:
    scaler = autoscaler(down=SCALE_DOWN)
    assert scaler.sync(0.0, 4, 4, 4.0) == 4
    assert scaler.sync(15.0, 4, 4, 8.0) == 8


def test_tolerance_keeps_one_pod_too_many_of_eleven() -> None:
    assert autoscaler().sync(0.0, 11, 11, 10.0) == 11
    assert autoscaler().sync(0.0, 9, 9, 8.0) == 8


def test_first_work_starts_smallest_number_of_pods() -> None:
    assert Activation(0, 300.0).poll(0.0, 0, 1.0) == 1
    assert Activation(3, 300.0).poll(0.0, 0, 1.0) == 3
    assert Activation(0, 300.0).poll(0.0, 6, 1.0) == 6


def test_all_pods_are_removed_after_cooldown_from_last_activity() -> None:
    keda = Activation(0, 300.0)
    assert keda.poll(0.0, 5, 2.0) == 5
    assert keda.poll(15.0, 5, 0.0) == 5
    assert keda.poll(300.0, 5, 0.0) == 5
    assert keda.poll(315.0, 5, 0.0) == 0


def test_pods_are_not_removed_while_the_metric_cannot_be_read() -> None:
    keda = Activation(0, 300.0)
    assert keda.poll(0.0, 5, 2.0) == 5
    assert keda.poll(1000.0, 5, None) == 5


def test_smallest_number_above_zero_is_kept_without_work() -> None:
    keda = Activation(2, 300.0)
    assert keda.poll(0.0, 2, 1.0) == 2
    assert keda.poll(1000.0, 2, 0.0) == 2
