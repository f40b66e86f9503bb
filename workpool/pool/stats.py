"""The control plane's own view of the queue, read now and then for the metrics (protocol §3.8)."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError
from workpool.events import QueueStatsRead

if TYPE_CHECKING:
    from workpool.pool.parts import Parts

log = logging.getLogger(__name__)


async def read_stats(parts: Parts) -> None:
    """Read them every `stats_interval` seconds until cancelled; a failure leaves the last ones."""
    while True:
        try:
            parts.observe(QueueStatsRead(await parts.calls.stats()))
        except ControlPlaneError as error:
            log.debug("stats not read error=%s", error)
        await asyncio.sleep(parts.settings.stats_interval)
