"""One session in one container: adopted or started, followed, and stopped in time.

What keeps a session from running twice at once (README, Adoption): a container is started only
after the item's metadata names it, which needs the lease; only a container that is so named is
adopted; and a container's *name* holds a word of its holder's own. Adopting and giving up are
renamings from that name, so a worker that lost its lease long ago cannot stop what another adopted.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from workpool import Release, WorkpoolError
from workpool.errors import TransientError, exhausted, innermost
from workpool_container.engine import ENDED, EngineError
from workpool_container.options import WORK_ID, specify
from workpool_container.output import Output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool import Session
    from workpool_container.engine import Engine, Found
    from workpool_container.options import Options

CONTAINER: Final = "workpool.container"
"""The item's metadata that names, by its id, the one container that counts."""
KILLED: Final = 128 + signal.SIGKILL
CANCELLED_SECONDS: Final = 2.0
"""A cancelled session's grace: a drain's last step takes 5 s, and the kill is to fit in."""
LOST_SECONDS: Final = 0.5
"""The grace when the lease is lost: less than the margin (1 s or more) before another may start."""
KILL_SECONDS: Final = 2.0
"""What an engine may take over the rest of a cancelled session's end."""
LAST_LINES_SECONDS: Final = 5.0
"""How long the output may lag behind the exit."""
FOLLOW_AGAIN_SECONDS: Final = 1.0
ADOPTED_LINES: Final = 100
"""How many lines of an adopted container's output are logged again."""
RETRY_DELAY_SECONDS: Final = 30.0
"""A session that could not be started here is not offered again for so long."""


class ContainerFailed(WorkpoolError):
    """A session's container ended with a failure, or was removed by somebody else.

    Attributes:
        status: Its exit status, None when there is none.
    """

    def __init__(self, container: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"container {container:.12}: {problem}")
        self.status = status


class Run:
    """A session's container, from the claim of the session to its exit. Belongs to one handler."""

    def __init__(
        self,
        engine: Engine,
        options: Options,
        session: Session,
        given: Mapping[str, str] | None = None,
    ) -> None:
        self._given = given
        self._engine = engine
        self._options = options
        self._session = session
        self._name = f"workpool-{session.item.id}-{secrets.token_hex(4)}"
        self._id = ""
        self._asked = False
        self._hurried = False
        self._grace: asyncio.Timeout | None = None

    async def complete(self) -> dict[str, str]:
        """Run the session to its end; the metadata to report.

        Raises:
            Release: Exit status 75, the engine does not start it, or it is left for adoption.
            ContainerFailed: Any other exit status, or somebody removed the container.
        """
        try:
            adopted = await self._begin()
            return await self._settle(await self._follow(adopted=adopted))
        except (asyncio.CancelledError, Exception) as error:
            # Released for want of memory or descriptors, the item may be started elsewhere.
            if isinstance(error, asyncio.CancelledError) or exhausted(error):
                await self._give_up()
            raise

    # Begin.

    async def _begin(self) -> bool:
        """Have the session's container running, or run; True when it was there before."""
        try:
            adopted = await self._adopt()
            if not adopted:
                await self._start()
        except (WorkpoolError, Release) as error:
            await self._give_up()
            if not isinstance(error, EngineError | TransientError):
                raise
            # Nothing of it has run to an end, and another worker may have a better engine.
            self._session.log.warning("container not started error=%s", error)
            raise Release("the container could not be started", RETRY_DELAY_SECONDS) from error
        return adopted

    async def _adopt(self) -> bool:
        """Take over the container that counts; remove all others of this item."""
        item = self._session.item
        adopted = False
        for found in await self._engine.containers(WORK_ID, item.id):
            self._check_lease()
            if self._counts(found) and await self._engine.rename(found.name, self._name):
                self._id, adopted = found.id, True
                self._session.log.info("container adopted id=%.12s %s", found.id, found.state)
            else:
                self._check_lease()
                await self._engine.remove(found.id)  # before ours starts: never two at once
        return adopted

    def _check_lease(self) -> None:
        """Call right before what another worker's container would suffer from.

        A worker that was frozen for longer than its lease runs on for a moment before it is told.
        """
        if not self._session.lease_remaining:
            raise Release("the lease has ended")

    def _counts(self, found: Found) -> bool:
        named = self._session.item.metadata.get(CONTAINER) == found.id
        return named and found.started and not found.ended

    async def _start(self) -> None:
        specification = specify(self._options, self._session, self._given)
        try:
            self._id = await self._engine.create(self._name, specification)
        except EngineError as error:
            if not error.absent or self._options.pull == "never":
                raise
            await self._engine.pull(self._options.image)  # removed since the worker started
            self._id = await self._engine.create(self._name, specification)
        await self._session.update_metadata({CONTAINER: self._id})
        self._check_lease()
        await self._engine.start(self._id)
        self._session.log.info("container started id=%.12s", self._id)

    # Follow.

    async def _follow(self, *, adopted: bool) -> int:
        try:
            async with asyncio.TaskGroup() as group:
                output = group.create_task(self._log(adopted=adopted), name="container-output")
                heed = group.create_task(self._heed(), name="container-interrupted")
                status = await self._engine.exit_of(self._id)
                heed.cancel()
                await asyncio.wait({output}, timeout=LAST_LINES_SECONDS)
                output.cancel()
        except BaseExceptionGroup as group_error:
            error = innermost(group_error)
            if isinstance(error, EngineError):
                error = ContainerFailed(self._id, "was removed by somebody else")
            raise error from error.__cause__  # not from the group
        return status

    async def _log(self, *, adopted: bool) -> None:
        output = Output(self._session.log, self._options.log_lines)
        tail = str(ADOPTED_LINES) if adopted else "all"
        while not output.full:
            try:
                async with aclosing(self._engine.output(self._id, tail)) as pieces:
                    async for stream, piece in pieces:
                        output.add(stream, piece)
                        if output.full:
                            return
            except EngineError as error:
                self._session.log.warning("container output interrupted error=%s", error)
                await asyncio.sleep(FOLLOW_AGAIN_SECONDS)
                tail = "0"  # rather a gap than the same lines again
            else:
                output.close()
                return

    async def _heed(self) -> None:
        """Stop the container when an operator asks or the pool goes away, unless it is left."""
        session = self._session
        await session.interrupted()
        if not session.stopping and self._options.on_drain == "leave":
            session.log.info("container left for adoption id=%.12s", self._id)
            raise Release("its container runs on, to be adopted")
        session.log.info("container asked to stop id=%.12s", self._id)
        self._asked = True
        try:
            await self._engine.stop(self._id, self._options.grace)
        except EngineError as error:
            # Gone, as `exit_of` will tell; or not reached, and the pool cancels us in time.
            session.log.warning("container not stopped error=%s", error)

    # End.

    async def _settle(self, status: int) -> dict[str, str]:
        self._session.log.info("container ended id=%.12s status=%d", self._id, status)
        if status == 0 or self._session.stopping:
            return {"exit_status": str(status)}
        if status == os.EX_TEMPFAIL or self._asked:
            await self._give_up()  # else the next run would adopt this end
            raise Release(f"exit status {status}")
        killed = " (SIGKILL: was it out of memory?)" if status == KILLED else ""
        raise ContainerFailed(self._id, f"exit status {status}{killed}", status)

    async def _give_up(self) -> None:
        """Leave nothing running, although the handler is cancelled again meanwhile.

        A further cancellation ends the container's grace; it is raised once the clean-up is over.
        """
        again: asyncio.CancelledError | None = None
        async with asyncio.TaskGroup() as group:
            cleaning = group.create_task(self._clean_up(), name="container-clean-up")
            while not cleaning.done():
                try:
                    await asyncio.wait({cleaning})
                except asyncio.CancelledError as error:
                    again = error
                    self._end_grace()
        if again is not None:
            raise again

    def _end_grace(self) -> None:
        self._hurried = True
        if self._grace is not None and not self._grace.expired():
            self._grace.reschedule(asyncio.get_running_loop().time())

    async def _clean_up(self) -> None:
        """A moment's grace, then the kill; bounded in all.

        A cancelled create or start may still be carried out by the engine. Removing waits for a
        start under way; a container that is created later is never started.
        """
        grace = CANCELLED_SECONDS if self._session.lease_remaining else LOST_SECONDS
        try:
            async with asyncio.timeout(grace + KILL_SECONDS):
                # Marked first: a stopped container's exit status is not the session's.
                if not await self._engine.rename(self._name, self._name + ENDED):
                    return  # never created, or adopted by the worker that has the lease now
                await self._terminate(grace)
        except (EngineError, TimeoutError) as error:
            self._session.log.critical("container may still run name=%s %r", self._name, error)

    async def _terminate(self, grace: float) -> None:
        ended = self._name + ENDED
        try:
            async with asyncio.timeout(0 if self._hurried else grace) as self._grace:
                await self._engine.stop(ended, grace)
        except (EngineError, TimeoutError):
            pass  # removing kills
        self._grace = None
        await self._engine.remove(ended)
