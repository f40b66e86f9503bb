"""A schedule: all that happens in one simulation, as plain values drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from random import Random

DeedKind = Literal[
    "work", "crash", "restart", "cut", "stop", "force", "drain", "sleep", "freeze", "expire",
    "pause", "deny",
]  # fmt: skip
DEEDS: Final[tuple[DeedKind, ...]] = (
    "crash", "restart", "cut", "cut", "cut", "stop", "force", "drain", "drain", "sleep", "freeze",
    "freeze", "expire", "pause", "deny",
)  # fmt: skip
PLAYS: Final = (
    "work", "work", "work", "raise", "release", "heedless", "stubborn", "tidy", "write", "odd",
    "eager", "detach", "detach", "swallow", "brink",
)  # fmt: skip
TROUBLES: Final = (
    "late", "late", "slow", "silence", "silence", "lost", "lost", "reset", "reset-applied",
    "500", "503", "429", "401", "garbage", "garbage-applied", "408", "403", "fading",
    "wait", "asleep", "asleep", "drowsy", "drowsy",
)  # fmt: skip
HORIZON_SECONDS: Final = 150.0
"""Until then things happen; after that everything heals."""
BURST_SHARE: Final = 0.06
"""The share of schedules with many short sessions at once."""
CLOSE_SHARE, CLOSE_SECONDS = 0.2, 0.008
PAUSE_SECONDS: Final = 2.5
"""The shortest pause of a virtual machine: shorter ones are not noticed."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One pool's settings, and how fast its lease clock runs.

    Attributes:
        write_rate: Writes per second that its own rate limit allows; 0 = unlimited.
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


@dataclass(frozen=True, slots=True)
class Deed:
    """Something that happens at a moment.

    Attributes:
        target: Which pool or item, counted round.
        seconds: How long it lasts: a cut, a sleep, a drain's timeout, a handler's work.
        play: What the handler of a new item does.
        count: How many items; negative: one more for the session of the one before.
    """

    at: float
    kind: DeedKind
    target: int = 0
    seconds: float = 0.0
    play: str = "work"
    count: int = 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """One simulation.

    Attributes:
        seed: Of everything that is left to chance: delays, jitter, which call is troubled.
        troubles: The share of calls that something befalls.
        kinds: What befalls them.
    """

    seed: int
    pools: tuple[Pool, ...]
    deeds: tuple[Deed, ...]
    troubles: float = 0.0
    kinds: tuple[str, ...] = TROUBLES


def draw(random: Random, seed: int) -> Schedule:
    """Draw a schedule."""
    pools = tuple(_pool(random) for _ in range(random.choice((1, 2, 2, 2, 3))))
    work = [_work(random) for _ in range(random.randint(1, 4))]
    if random.random() < BURST_SHARE:
        work.append(_burst(random))
    deeds = [_deed(random) for _ in range(random.choice((0, 1, 2, 3, 4, 5)))]
    deeds = [_close_to(random.choice(work), deed, random) for deed in deeds]
    kinds = (*random.choice(((), ("late",))), *random.sample(TROUBLES, random.randint(1, 4)))
    share = random.choice((0.0, 0.0, 0.05, 0.15, 0.35))
    return Schedule(seed, pools, tuple(sorted([*work, *deeds], key=_at)), share, kinds)


def _close_to(work: Deed, deed: Deed, random: Random) -> Deed:
    """Move some deeds into the milliseconds in which an item is claimed or completed."""
    if random.random() < CLOSE_SHARE:
        return replace(deed, at=round(work.at + random.uniform(0, CLOSE_SECONDS), 4))
    return deed


def _at(deed: Deed) -> float:
    return deed.at


def _pool(random: Random) -> Pool:
    return Pool(
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


def _work(random: Random) -> Deed:
    return Deed(
        at=_moment(random, 60),
        kind="work",
        target=random.randrange(4),
        seconds=random.choice((0.005, 3.0, 9.0, 20.0, 30.0, 45.0)) * random.uniform(0.8, 1.2),
        play=random.choice(PLAYS),
        count=random.choice((1, 1, 1, 2, 3, -1)),
    )


def _burst(random: Random) -> Deed:
    play = random.choice(("raise", "work"))
    return Deed(_moment(random, 30), "work", seconds=0.005, play=play, count=random.randint(6, 9))


def _deed(random: Random) -> Deed:
    kind = random.choice(DEEDS)
    seconds = random.choice((0.0, 2.0, 10.0, 20.0, 40.0)) * random.uniform(0.8, 1.2)
    return Deed(_moment(random, 120), kind, random.randrange(8), round(seconds, 3))


def _moment(random: Random, until: float) -> float:
    return round(random.choice((0.0, random.uniform(0, 3), random.uniform(0, until))), 3)
