"""Reading the remote queue's statistics for the metrics."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from workpool.errors import ControlPlaneError
from workpool.events import QueueStatsRead

if TYPE_CHECKING:
    from workpool.pool.context import PoolContext

log = logging.getLogger(__name__)


async def read_remote_stats(context: PoolContext) -> None:
    """Read the statistics every `stats_interval` seconds; after a failure the last ones stay."""
    optional, client = context.optional, context.client
    while True:
        try:
            context.observe(QueueStatsRead, await optional.make("stats", client.stats))
        except ControlPlaneError as error:
            log.debug("stats not read error=%s", error)
        await asyncio.sleep(context.settings.stats_interval)
