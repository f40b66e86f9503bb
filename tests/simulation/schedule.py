"""Schedules: the pools, actions and faults of a simulation, generated at random from one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from random import Random

ActionKind = Literal[
    "work", "crash", "restart", "cut", "stop", "force", "drain", "sleep", "freeze", "expire",
    "pause", "deny", "refrain",
]  # fmt: skip
ACTION_KINDS: Final[tuple[ActionKind, ...]] = (
    "crash", "restart", "cut", "cut", "cut", "stop", "force", "drain", "drain", "sleep", "freeze",
    "freeze", "expire", "pause", "deny",
)  # fmt: skip
BEHAVIOURS: Final = (
    "work", "work", "work", "raise_error", "release", "work", "ignore_cancellation", "clean_up",
    "write_metadata", "return_wrong_type", "end_early", "hand_off", "hand_off",
    "swallow_cancellation", "return_at_timeout",
)  # fmt: skip
STALL_BEHAVIOURS: Final = ("hang", "report_progress", "wait_for_person")
"""Behaviours of handlers in pools with a stall timeout."""
FAULT_KINDS: Final = (
    "late", "late", "slow", "silence", "silence", "silence-applied", "silence-applied",
    "reset", "reset-applied",
    "500", "503", "429", "401", "garbled", "garbled-applied", "408", "403", "fading",
    "wait", "asleep", "asleep", "drowsy", "drowsy",
)  # fmt: skip
ControlPlaneKind = Literal["strict", "active acks", "poll leases"]
CONTROL_PLANES: Final[tuple[ControlPlaneKind, ...]] = (
    *("strict", "strict", "strict", "strict", "strict", "strict"),
    *("active acks", "poll leases"),
)
WORKER_KEY_SHARE: Final = 0.2
"""The share of schedules with pools whose key may not read items or write metadata."""
CROWDED_SHARE: Final = 0.7
"""The share of schedules without a strict control plane in which items wait long for a slot."""
FIRST_HEARTBEATS_SHARE: Final = 0.5
"""The share of crowded schedules in which first heartbeats, not renewals, get no answer."""
REFRAIN_SHARE: Final = 0.15
"""The share of schedules in which an operator pauses the claiming of a pool."""
RETRY_SHARE: Final = 0.2
"""The share of schedules in which half of the work fails and is retried."""
LIMITS_SHARE: Final = 0.15
HANDLER_LIMIT_SHARE: Final = 0.15
"""The share of schedules with pools that end by themselves."""
STALL_SHARE: Final = 0.12
"""The share of schedules with pools that end sessions without progress."""
SHARED_SLOTS_SHARE: Final = 0.1
"""The share of schedules whose pools share slots, as environments of one process do."""
BURST_SHARE: Final = 0.06
"""The share of schedules with many short sessions at once."""
CLOSE_SHARE, CLOSE_SECONDS = 0.2, 0.008
"""CLOSE_SHARE of the actions happen within CLOSE_SECONDS of new work."""
PAUSE_SECONDS: Final = 2.5
"""The shortest pause of a virtual machine: pools do not notice shorter ones."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """The settings of one pool, the permissions of its key and the rate of its lease clock.

    Attributes:
        rate: Seconds of its lease clock per second.
        write_rate: Writes per second that its own rate limit allows; 0 = unlimited.
        worker_key: Its key may not read items or write metadata.
        stall_timeout: The time without progress after which a session is ended; None = no limit.
        exit_after_sessions: The number of sessions after which it ends; None = no limit.
        exit_after_idle: The idle time after which it ends; None = no limit.
        exit_after_uptime: The uptime after which it claims nothing more; None = no limit.
        max_sessions: The limit of its handler; None = no limit.
    """

    concurrency: int = 2
    prefetch: int = 0
    pollers: int = 1
    lease_ttl: int = 10
    reclaim_ms: int = 5000
    drain_timeout: float = 20.0
    stop_grace: float = 5.0
    session_timeout: float | None = None
    request_timeout: float = 10.0
    rate: float = 1.0
    write_rate: float = 0.0
    worker_key: bool = False
    stall_timeout: float | None = None
    exit_after_sessions: int | None = None
    exit_after_idle: float | None = None
    exit_after_uptime: float | None = None
    max_sessions: int | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """One event of a schedule: new work, or a disturbance of a pool or an item.

    Attributes:
        at: Seconds after the start of the simulation.
        target: Index of the pool or item, modulo their number.
        seconds: Duration of a cut, a sleep or a handler's work, or the timeout of a drain.
        behaviour: What the handler of a new item does: one of `BEHAVIOURS`, or `retry`.
        count: Number of new items. Negative: one item for the session of the item before.
    """

    at: float
    kind: ActionKind
    target: int = 0
    seconds: float = 0.0
    behaviour: str = "work"
    count: int = 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """The pools, actions and faults of one simulation.

    Attributes:
        seed: Seed of all random choices of the simulation: delays, jitter, faulty calls.
        fault_share: The share of calls that get a fault.
        fault_kinds: The kinds of these faults.
        control_plane: `strict`: as the protocol says. `active acks`: acks answer `active`, to
            whoever sends them. `poll leases`: so they do, and a lease begins with its poll.
        shared_slots: The number of slots that all pools share; None: each has its own.
    """

    seed: int
    pools: tuple[PoolSettings, ...]
    actions: tuple[Action, ...]
    fault_share: float = 0.0
    fault_kinds: tuple[str, ...] = FAULT_KINDS
    control_plane: ControlPlaneKind = "strict"
    shared_slots: int | None = None


def generate_schedule(random: Random, seed: int) -> Schedule:
    """Generate a random schedule with the given generator of random numbers."""
    return _share_slots_between_some_pools(
        _generate_schedule_without_shared_slots(random, seed), random
    )


def _generate_schedule_without_shared_slots(random: Random, seed: int) -> Schedule:
    pools = tuple(_generate_pool_settings(random) for _ in range(random.choice((1, 2, 2, 2, 3))))
    work = [_generate_enqueue_action(random) for _ in range(random.randint(1, 4))]
    if random.random() < BURST_SHARE:
        work.append(_generate_burst_of_work(random))
    actions = [_generate_action(random) for _ in range(random.choice((0, 1, 2, 3, 4, 5)))]
    actions = [
        _sometimes_move_action_after_work(random.choice(work), action, random) for action in actions
    ]
    kinds = (*random.choice(((), ("late",))), *random.sample(FAULT_KINDS, random.randint(1, 4)))
    share = random.choice((0.0, 0.0, 0.05, 0.15, 0.35))
    control_plane = random.choice(CONTROL_PLANES)
    if control_plane != "strict" and random.random() < CROWDED_SHARE:
        # Let items wait for a slot during most of their lease while the network delays heartbeats.
        pools = tuple(replace(pool, concurrency=1, prefetch=2) for pool in pools)
        work += _generate_work_that_fills_all_slots(random)
    actions = sorted([*work, *actions], key=_time_of_action)
    if random.random() < WORKER_KEY_SHARE:
        pools = tuple(
            replace(pool, worker_key=random.choice((True, True, False))) for pool in pools
        )
    if random.random() < LIMITS_SHARE:
        pools = tuple(_generate_exit_limits(pool, random) for pool in pools)
    if random.random() < HANDLER_LIMIT_SHARE:
        pools = tuple(
            replace(pool, concurrency=3, max_sessions=random.choice((1, 1, 2))) for pool in pools
        )
    if random.random() < REFRAIN_SHARE:
        pauses = [
            replace(_generate_action(random), kind="refrain") for _ in range(random.randint(1, 3))
        ]
        pauses = [
            _sometimes_move_action_after_work(random.choice(work), pause, random)
            for pause in pauses
        ]
        actions = sorted([*actions, *pauses], key=_time_of_action)
    if random.random() < RETRY_SHARE:
        actions = [_generate_retry_behaviour(action, random) for action in actions]
        more = [
            _generate_halt_or_stop_request(random.choice(work), random)
            for _ in range(random.randint(0, 3))
        ]
        actions = sorted([*actions, *more], key=_time_of_action)
    schedule = Schedule(seed, pools, tuple(actions), share, kinds, control_plane)
    return (
        _add_timeouts_and_handlers_for_stalls(schedule, random)
        if random.random() < STALL_SHARE
        else schedule
    )


def _share_slots_between_some_pools(schedule: Schedule, random: Random) -> Schedule:
    """Return the schedule, or sometimes a copy in which all pools share their slots."""
    if random.random() >= SHARED_SLOTS_SHARE:
        return schedule
    pools = [
        replace(pool, exit_after_sessions=None, exit_after_idle=None, exit_after_uptime=None)
        for pool in schedule.pools
    ]
    total = random.randint(len(pools), max(len(pools), sum(pool.concurrency for pool in pools)))
    return replace(schedule, pools=tuple(pools), shared_slots=total)


def _add_timeouts_and_handlers_for_stalls(schedule: Schedule, random: Random) -> Schedule:
    """Add stall timeouts, and handlers that make progress, hang or wait for a person."""
    limits = random.choice((4.0, 10.0)), random.choice((None, 4.0, 15.0))
    pools = [replace(pool, stall_timeout=random.choice(limits)) for pool in schedule.pools]
    work = [
        replace(_generate_enqueue_action(random), behaviour=random.choice(STALL_BEHAVIOURS))
        for _ in range(random.randint(1, 3))
    ]
    actions = sorted([*schedule.actions, *work], key=_time_of_action)
    return replace(schedule, pools=tuple(pools), actions=tuple(actions))


def _generate_halt_or_stop_request(work: Action, random: Random) -> Action:
    """Return a stop request or a halt of a machine, at a time 1 to 12 s after the action `work`.

    A halt lasts 8 to 20 s. Its kind is `sleep`, `freeze` or `pause`.
    """
    kinds: tuple[ActionKind, ...] = ("sleep", "freeze", "pause", "stop", "stop", "stop")
    at, seconds = work.at + random.uniform(1, 12), random.uniform(8, 20)
    return Action(round(at, 3), random.choice(kinds), random.randrange(4), round(seconds, 3))


def _generate_retry_behaviour(action: Action, random: Random) -> Action:
    """Return the action. If it is a `work` action, give it the behaviour `retry` at random.

    The probability is one half.
    """
    chosen = action.kind == "work" and random.random() < 0.5
    return replace(action, behaviour="retry") if chosen else action


def _sometimes_move_action_after_work(work: Action, action: Action, random: Random) -> Action:
    """Return the action, or sometimes a copy that happens milliseconds after `work`.

    In these milliseconds, items are claimed and short sessions are completed.
    """
    if random.random() < CLOSE_SHARE:
        return replace(action, at=round(work.at + random.uniform(0, CLOSE_SECONDS), 4))
    return action


def _time_of_action(action: Action) -> float:
    return action.at


def _generate_pool_settings(random: Random) -> PoolSettings:
    return PoolSettings(
        concurrency=random.choice((1, 1, 2, 3)),
        prefetch=random.choice((0, 0, 1, 2)),
        pollers=random.choice((1, 1, 2)),
        lease_ttl=random.choice((10, 10, 12, 20, 30)),
        reclaim_ms=random.choice((0, 200, 1000, 5000, 5000)),
        drain_timeout=random.choice((0.0, 1.0, 10.0, 30.0)),
        stop_grace=random.choice((1.0, 5.0, 20.0)),
        session_timeout=random.choice((None, None, None, 8.0, 25.0)),
        request_timeout=random.choice((2.0, 10.0)),
        rate=random.choice((1.0, 1.0, 0.9999, 1.0001)),
        write_rate=random.choice((0.0, 0.0, 0.0, 0.0, 2.0)),
    )


def _generate_exit_limits(pool: PoolSettings, random: Random) -> PoolSettings:
    return replace(
        pool,
        exit_after_sessions=random.choice((None, 1, 1, 2, 3)),
        exit_after_idle=random.choice((None, None, 3.0, 15.0)),
        exit_after_uptime=random.choice((None, None, 5.0, 30.0)),
    )


def _generate_enqueue_action(random: Random) -> Action:
    return Action(
        at=_generate_action_time(random, 60),
        kind="work",
        target=random.randrange(4),
        seconds=random.choice((0.005, 3.0, 9.0, 20.0, 30.0, 45.0)) * random.uniform(0.8, 1.2),
        behaviour=random.choice(BEHAVIOURS),
        count=random.choice((1, 1, 1, 2, 3, -1)),
    )


def _generate_burst_of_work(random: Random) -> Action:
    behaviour = random.choice(("raise_error", "work"))
    return Action(
        _generate_action_time(random, 30),
        "work",
        seconds=0.005,
        behaviour=behaviour,
        count=random.randint(6, 9),
    )


def _generate_work_that_fills_all_slots(random: Random) -> list[Action]:
    """Return work that fills all slots, and actions that delay the answers to heartbeats."""
    seconds, at = random.uniform(25, 45), _generate_action_time(random, 10)
    work = Action(at, "work", seconds=seconds, count=random.randint(4, 7))
    ends = round(at + seconds - random.uniform(0, 2), 3)
    targets = range(random.choice((1, 3)))
    if random.random() < FIRST_HEARTBEATS_SHARE:
        return [work, *(Action(ends, "cut", target, seconds=45.0) for target in targets)]
    cut = round(at + random.uniform(2, 20), 3)
    cuts = [Action(cut, "cut", target, seconds=6.0) for target in targets]
    return [work, *cuts, *(Action(cut + 5, "expire", target) for target in range(3))]


def _generate_action(random: Random) -> Action:
    kind = random.choice(ACTION_KINDS)
    seconds = random.choice((0.0, 2.0, 10.0, 20.0, 40.0)) * random.uniform(0.8, 1.2)
    return Action(_generate_action_time(random, 120), kind, random.randrange(8), round(seconds, 3))


def _generate_action_time(random: Random, until: float) -> float:
    return round(random.choice((0.0, random.uniform(0, 3), random.uniform(0, until))), 3)
