"""What is noted while a simulation runs, beside the control plane's own history.

By the network: what every pool sent and was answered. By the handlers: when they ran and when they
were told to end. Nothing in here is what a pool says of itself, but the events that `agreement`
holds against the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool.events import Event
    from workpool.testing.local import Trouble
    from workpool.testing.simulation.machine import Machine
    from workpool.testing.simulation.schedule import Pool

FOREVER: Final = float("inf")
LATENCY_SECONDS: Final = 0.001
"""No request arrives at once: the control plane's clock counts whole microseconds."""


@dataclass(slots=True, eq=False, repr=False)
class Sent:
    """One call of a pool.

    Attributes:
        trouble: What befell it.
        answer: "ok", the status of a refusal, or "lost"; None: its caller did not wait for it.
        told: What the answer said, where it was good.
        patch: The metadata of an update.
    """

    at: float
    node: Node
    op: str
    work_id: str | None
    trouble: Trouble | None
    answer: str | int | None = None
    answered_at: float = FOREVER
    told: object = None
    patch: Mapping[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        """Who sent it, for which item, when."""
        return f"{self.node.machine.name}:{self.op}({str(self.work_id)[-6:]})@{self.at:.3f}"

    @property
    def arrives_at(self) -> float:
        """When the control plane carries it out, whatever its sender hears of it; perhaps never."""
        if self.trouble is None:
            return self.at + LATENCY_SECONDS
        return self.at + self.trouble.there if self.trouble.applied else FOREVER

    @property
    def over_at(self) -> float:
        """When nothing comes of it any more: a request may arrive after its sender gave up."""
        trouble = self.trouble
        late = 0.0
        if trouble is not None:
            late = trouble.there + trouble.back + (trouble.retry_after or 0.0)
        return max(self.answered_at, self.at + late + 0.1)


@dataclass(slots=True, eq=False, repr=False)
class Delay:
    """A call that waited on its own machine before its check; it may never have been sent.

    Attributes:
        work_id: None: the client does not know for which item.
    """

    node: Node
    work_id: str | None
    since: float
    until: float


@dataclass(slots=True, eq=False, repr=False)
class Run:
    """One handler's run.

    Attributes:
        play: What it was to do.
        told_at: When it was first cancelled.
        result: How it ended: returned, raised, released, cancelled, handed (over to a child);
            None: it had not.
        stop_seen: An operator's wish had reached it when it ended.
        attempt: The number that its session was given.
        leaked: Another session's context variable was set when it started.
    """

    node: Node
    work_id: str
    session_id: str
    play: str
    started: float
    ended: float = FOREVER
    told_at: float = FOREVER
    result: str | None = None
    stop_seen: bool = False
    attempt: int = 1
    leaked: bool = False

    @property
    def obeyed_at(self) -> float:
        """When it ended, or was told to."""
        return min(self.ended, self.told_at)


@dataclass(slots=True, eq=False, repr=False)
class Handing:
    """One block in which a handler hands its item over.

    Attributes:
        ttl: Of the lease, in seconds.
    """

    node: Node
    work_id: str
    ttl: float
    entered: float
    left: float = FOREVER


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """One life of one pool.

    Attributes:
        child: It is the holder of one item that a pool has handed over.
        born: When it was started.
        drain: When its drain began, and the seconds that it was given; None: it had none.
        polls: How many it began; one that waits on its machine may never be sent.
        closed: When nothing of it was left; infinite if it crashed.
        crashed: When it vanished.
        calm: What a call is like that nothing befalls.
        cuts: From when to when nothing that it sent arrived.
        denials: From when to when its acks were refused.
        claim_permits: When it acquired permits for acks, if it has a rate limit.
    """

    machine: Machine
    pool: Pool
    born: float
    worker_id: str = ""
    child: bool = False
    drain: tuple[float, float] | None = None
    drained: float = FOREVER
    closed: float = FOREVER
    crashed: float = FOREVER
    left_behind: int = 0
    polls: int = 0
    error: BaseException | None = None
    calm: Trouble = field(init=False)
    cuts: list[tuple[float, float]] = field(default_factory=list)
    denials: list[tuple[float, float]] = field(default_factory=list)
    claim_permits: list[float] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)

    def paused(self, start: float, end: float) -> bool:
        """Whether it stood still at any time between."""
        return any(since < end and until > start for since, until in self.machine.pauses)

    def stood(self, start: float, end: float) -> float:
        """Return the seconds between for which it stood still."""
        pauses = self.machine.pauses
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in pauses)

    def paused_unseen(self, start: float, end: float) -> bool:
        """Whether its lease clock stood still at any time between."""
        return any(since < end and until > start for since, until in self.machine.unseen)


@dataclass(slots=True, repr=False)
class Trace:
    """All that was noted.

    Attributes:
        broken: Items whose lease the operator ended early, and when.
    """

    nodes: list[Node] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    handings: list[Handing] = field(default_factory=list)
    delays: list[Delay] = field(default_factory=list)
    broken: list[tuple[float, str]] = field(default_factory=list)
    troubles: int = 0
    deeds: int = 0
