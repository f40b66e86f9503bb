"""What the parts of one pool share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from workpool.events import Event
    from workpool.plugins import Plugins
    from workpool.pool.calls import Calls
    from workpool.pool.claim import Claim
    from workpool.pool.clock import Clock
    from workpool.pool.keeper import Keeper
    from workpool.pool.queue import BoundedQueue
    from workpool.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """Handed to every part as it is made; lives as long as the supervisor's root task.

    Attributes:
        calls: The client of the handlers' loop.
        clock: The lease clock.
        observe: Tells the observers; to be called on the handlers' loop.
    """

    settings: Settings
    calls: Calls
    plugins: Plugins
    keeper: Keeper
    queue: BoundedQueue[Claim]
    clock: Clock
    observe: Callable[[Event], None]
