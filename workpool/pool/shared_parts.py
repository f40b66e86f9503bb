"""The parts that the pools of one process share: slots, exit limits and exporter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workpool.exporter import Exporter
    from workpool.pool.admission import ExitLimits
    from workpool.pool.shared_slots import SlotShare


@dataclass(frozen=True, slots=True)
class SharedParts:
    """The parts of one pool that the other pools of its process use, too.

    Attributes:
        slots: The pool's share of the slots.
        limits: The exit limits.
        exporter: The server of the metrics of all pools, which others open; None: there is none.
    """

    slots: SlotShare
    limits: ExitLimits
    exporter: Exporter | None
