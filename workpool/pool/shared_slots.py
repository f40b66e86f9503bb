"""The slots of a process that works for several environments, and the rules for sharing them.

Each environment has a slot of its own, which its poll reserves while no session uses it. So an item
never waits because the sessions of other environments occupy all slots. A further slot goes to the
waiting environment with the fewest slots; among equals, to the one whose last slot was granted the
longest time ago. Used on one event loop only; `count_available_slots` may be called on any
thread. See workpool/docs/architecture.md, "Slots of several environments".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.exporter import Exporter
    from workpool.pool.exit_limits import ExitLimits


class SharedSlots:
    """All slots of a process, and their distribution among its environments.

    Args:
        total: The number of slots: at least one for each environment.
        uses: The number of items that the process may still run; at 0, it starts no more items.
            None: no limit.
    """

    def __init__(self, total: int, uses: int | None = None) -> None:
        self._total = total
        self._uses = uses
        self._shares: list[SlotShare] = []
        self._order = itertools.count()

    def add_environment_share(self) -> SlotShare:
        """Add an environment, and return the object through which it takes and returns slots."""
        share = SlotShare(self)
        self._shares.append(share)
        return share

    def remove_environment(self, share: SlotShare) -> None:
        """Remove an environment, whose reserved slot the other environments may use from now on."""
        self._shares.remove(share)
        self.grant_free_slots()

    def grant_free_slots(self) -> None:
        """Give the free slots to the environments that wait for one, the lowest rank first."""
        while (waiting := self._find_next_waiting_environment()) is not None:
            share, use_slot = waiting
            share.taken += 1
            share.granted = next(self._order)
            use_slot()

    def count_available_slots(self, share: SlotShare) -> int:
        """Return the number of further slots that an environment could take now."""
        common, most = self._count_free_slots()
        return min(common + (not share.taken), most)

    def take_slot(self, share: SlotShare) -> bool:
        """Take a slot for an environment, and return whether it got one.

        The environment gets no slot if none is free, or if a waiting environment has a lower rank.
        """
        if not self.count_available_slots(share):
            return False
        waiting = self._find_next_waiting_environment()
        if waiting is not None and waiting[0] is not share and waiting[0].rank <= share.rank:
            return False
        share.taken += 1
        share.granted = next(self._order)
        return True

    def return_slot(self, share: SlotShare, *, used_up: bool) -> None:
        """Count a slot of an environment as free; `grant_free_slots` grants it to an environment.

        If `used_up`, the item that ran in the slot counts towards the limit `uses`.
        """
        share.taken -= 1
        if used_up and self._uses is not None:
            self._uses -= 1

    def _find_next_waiting_environment(self) -> tuple[SlotShare, Callable[[], None]] | None:
        """Return the waiting environment with the lowest rank, and a function that uses a slot.

        The caller first counts one more slot as taken by the environment. It then calls the
        function, which starts an item in that slot, or lets a poller reserve the slot. Returns None
        if no environment waits for a slot that it may take.
        """
        common, most = self._count_free_slots()
        waiting = [
            (each, use_slot)
            for each in self._shares
            if min(common + (not each.taken), most) and (use_slot := each.next_use()) is not None
        ]
        return min(waiting, key=lambda each: each[0].rank, default=None)

    def _count_free_slots(self) -> tuple[int, int]:
        """Return how many shared slots are free, and how many more slots `uses` permits to take.

        A shared slot is not reserved for one environment. `uses` is the number of items that the
        process may still run, and every slot that is taken now needs one of them.
        """
        taken = [each.taken for each in tuple(self._shares)]
        common = max(0, self._total - sum(max(1, each) for each in taken))
        left = self._total if self._uses is None else self._uses
        return common, max(0, left - sum(taken))


class SlotShare:
    """The share of one environment in the slots of the process.

    Attributes:
        taken: The number of slots that polls have reserved or sessions occupy.
        granted: The sequence number of the last slot that the environment was granted; all
            environments share one sequence.
        next_use: Returns the function that uses one more slot, which is called once the slot is
            granted; None if the environment could not use one now.
    """

    def __init__(self, slots: SharedSlots) -> None:
        self.taken = 0
        self.granted = -1
        self.next_use: Callable[[], Callable[[], None] | None] = lambda: None
        self._slots = slots

    @property
    def rank(self) -> tuple[int, int]:
        """The rank of this environment among those that wait for a slot: (`taken`, `granted`).

        The waiting environment with the lowest rank gets the next slot.
        """
        return self.taken, self.granted

    @property
    def available_slots(self) -> int:
        """The number of further slots that the environment could take now."""
        return self._slots.count_available_slots(self)

    def take_slot(self) -> bool:
        """Take a slot and return True; return False if none is free for this environment."""
        return self._slots.take_slot(self)

    def return_slot(self, *, used_up: bool = False) -> None:
        """Free a slot of this environment; if `used_up`, count the item that ran in it as a use."""
        self._slots.return_slot(self, used_up=used_up)

    def grant_free_slots(self) -> None:
        """Give the free slots of the process to the environments that wait for one."""
        self._slots.grant_free_slots()

    def release_reserved_slot(self) -> None:
        """Release the slot that is reserved for this environment, because its pool has ended."""
        self._slots.remove_environment(self)


@dataclass(frozen=True, slots=True)
class SharedPoolResources:
    """The objects that a pool shares with the other pools of its process.

    Attributes:
        slots: The pool's share of the slots.
        limits: The exit limits.
        exporter: The server for the metrics of all pools, opened and closed elsewhere; None: there
            is none.
    """

    slots: SlotShare
    limits: ExitLimits
    exporter: Exporter | None
