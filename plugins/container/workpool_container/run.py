"""One session in one container, which is adopted or started, followed, and stopped in time.

A session never runs twice at once: a container is started only after the metadata of the item names
it, which needs the lease, and only such a container is adopted. The *name* of a container contains
a random word that only its worker knows. A worker adopts a container, or gives it up, by renaming
it from that name. So a worker that lost its lease long ago cannot stop a container that another
worker adopted. See plugins/container/README.md, "Adoption".
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
"""The metadata of the item with the id of its only valid container."""
KILLED: Final = 128 + signal.SIGKILL
CANCELLED_SECONDS: Final = 2.0
"""Grace of a cancelled session. The last step of a drain takes 5 s, the kill included."""
LOST_SECONDS: Final = 0.5
"""Grace when the lease is lost: less than the margin (1 s) before another worker may start."""
KILL_SECONDS: Final = 2.0
"""Bound of the engine's calls after the grace of a cancelled session."""
LAST_LINES_SECONDS: Final = 5.0
"""Seconds by which the output may lag behind the exit."""
FOLLOW_AGAIN_SECONDS: Final = 1.0
ADOPTED_LINES: Final = 100
"""Lines of an adopted container's earlier output that are logged again."""
RETRY_DELAY_SECONDS: Final = 30.0
"""Delay of the release of a session that could not be started here."""


class ContainerFailed(WorkpoolError):
    """The container of a session failed, or another program removed it.

    Attributes:
        status: The exit status; None without one.
    """

    def __init__(self, container: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"container {container:.12}: {problem}")
        self.status = status


class Run:
    """The container of a session, from the start of the handler to its exit."""

    def __init__(
        self,
        engine: Engine,
        options: Options,
        session: Session,
        given: Mapping[str, str] | None = None,
        *,
        watched: bool = False,
    ) -> None:
        """Create the run of a session.

        Args:
            engine: The engine.
            options: The settings of the plugin.
            session: The session.
            given: More variables of the container.
            watched: Whether all output is read, because a session without output ends as stalled.
        """
        self._given = given
        self._watched = watched
        self._engine = engine
        self._options = options
        self._session = session
        self._name = f"workpool-{session.item.id}-{secrets.token_hex(4)}"
        self._id = ""
        self._asked = False
        self._hurried = False
        self._grace: asyncio.Timeout | None = None

    async def complete(self) -> dict[str, str]:
        """Run the session to its end, and return its metadata.

        Raises:
            Release: The exit status is 75, the engine does not start the container, or the
                container is left running for adoption.
            ContainerFailed: The exit status is neither 0 nor 75, or another program removed the
                container.
        """
        try:
            adopted = await self._adopt_or_start()
            return await self._result_of(await self._await_exit(adopted=adopted))
        except (asyncio.CancelledError, Exception) as error:
            # Without memory or descriptors here, the item is released for another worker.
            if isinstance(error, asyncio.CancelledError) or exhausted(error):
                await self._give_up()
            raise

    def _log_fields(self) -> dict[str, str]:
        return {"container_id": self._id[:12]}

    # Adopting or starting the container.
    async def _adopt_or_start(self) -> bool:
        """Adopt or start the container; return whether it was adopted."""
        try:
            adopted = await self._adopt()
            if not adopted:
                await self._start_container()
        except (WorkpoolError, Release) as error:
            await self._give_up()
            if not isinstance(error, EngineError | TransientError):
                raise
            # The container has not run to its end, and another worker may have a better engine.
            self._session.log.warning(
                "container not started: %s", error, extra={"error": str(error)}
            )
            raise Release("the container could not be started", RETRY_DELAY_SECONDS) from error
        return adopted

    async def _adopt(self) -> bool:
        """Adopt the valid container; remove all others of this item."""
        item = self._session.item
        adopted = False
        for found in await self._engine.containers(WORK_ID, item.id):
            self._check_lease()
            if self._is_adoptable(found) and await self._engine.rename(found.name, self._name):
                self._id, adopted = found.id, True
                self._session.log.info(
                    "container adopted", extra={"container_id": found.id[:12], "state": found.state}
                )
            else:
                self._check_lease()
                await self._engine.remove(found.id)  # before another one starts
        return adopted

    def _check_lease(self) -> None:
        """Check the lease right before a call that may harm a container of another worker.

        A worker that was frozen for longer than its lease runs on for a moment before it notices.
        """
        if not self._session.lease_remaining:
            raise Release("the lease has ended")

    def _is_adoptable(self, found: Found) -> bool:
        named = self._session.item.metadata.get(CONTAINER) == found.id
        return named and found.started and not found.ended

    async def _start_container(self) -> None:
        specification = specify(self._options, self._session, self._given)
        try:
            self._id = await self._engine.create(self._name, specification)
        except EngineError as error:
            if not error.absent or self._options.pull == "never":
                raise
            await self._engine.pull(self._options.image)  # the image was removed meanwhile
            self._id = await self._engine.create(self._name, specification)
        await self._session.update_metadata({CONTAINER: self._id})
        self._check_lease()
        await self._engine.start(self._id)
        self._session.log.info("container started", extra=self._log_fields())

    # Waiting for the end of the container.

    async def _await_exit(self, *, adopted: bool) -> int:
        try:
            async with asyncio.TaskGroup() as group:
                output = group.create_task(
                    self._log_output(adopted=adopted), name="container-output"
                )
                obeying = group.create_task(self._obey_stop(), name="container-interrupted")
                status = await self._engine.exit_of(self._id)
                obeying.cancel()
                await asyncio.wait({output}, timeout=LAST_LINES_SECONDS)
                output.cancel()
        except BaseExceptionGroup as group_error:
            error = innermost(group_error)
            if isinstance(error, EngineError):
                error = ContainerFailed(self._id, "was removed by another program")
            raise error from error.__cause__  # the error in the group, not the group
        return status

    async def _log_output(self, *, adopted: bool) -> None:
        output = Output(self._session.log, self._options.log_lines, self._session.progress)
        tail = str(ADOPTED_LINES) if adopted else "all"
        while self._watched or not output.full:
            try:
                async with aclosing(self._engine.output(self._id, tail)) as pieces:
                    async for stream, piece in pieces:
                        output.add(stream, piece)
                        if output.full and not self._watched:
                            return
            except EngineError as error:
                self._session.log.warning(
                    "container output interrupted: %s", error, extra={"error": str(error)}
                )
                await asyncio.sleep(FOLLOW_AGAIN_SECONDS)
                # some lines may be missing, which is better than lines that appear twice
                tail = "0"
            else:
                output.close()
                return

    async def _obey_stop(self) -> None:
        """Stop the container after a stop request, or in a drain unless it is left running."""
        session = self._session
        await session.interrupted()
        if not session.stopping and self._options.on_drain == "leave":
            session.log.info("container left for adoption", extra=self._log_fields())
            raise Release("its container runs on, to be adopted")
        session.log.info("container gets a stop signal", extra=self._log_fields())
        self._asked = True
        try:
            await self._engine.stop(self._id, self._options.grace)
        except EngineError as error:
            # Either the container is gone, which `exit_of` reports, or the engine does not answer,
            # and the pool cancels the handler in time.
            session.log.warning("container not stopped: %s", error, extra={"error": str(error)})

    # Ending the session.
    async def _result_of(self, status: int) -> dict[str, str]:
        self._session.log.info("container ended", extra={**self._log_fields(), "status": status})
        if status == 0 or self._session.stopping:
            return {"exit_status": str(status)}
        if status == os.EX_TEMPFAIL or self._asked:
            await self._give_up()  # otherwise the next run would adopt the container and its status
            raise Release(f"exit status {status}")
        killed = " (SIGKILL: was it out of memory?)" if status == KILLED else ""
        raise ContainerFailed(self._id, f"exit status {status}{killed}", status)

    async def _give_up(self) -> None:
        """End the container, even if the handler is cancelled again meanwhile.

        A further cancellation shortens the stop of the container, and is raised after the clean-up.
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
        """Stop the container with a short grace, then remove it. Both have a time limit.

        The engine may still carry out a cancelled create or start. The removal waits for a start
        that is in progress; a container that is created later is never started.
        """
        grace = CANCELLED_SECONDS if self._session.lease_remaining else LOST_SECONDS
        try:
            async with asyncio.timeout(grace + KILL_SECONDS):
                # Renamed before the stop, so that no worker adopts the container and takes the exit
                # status of a stopped container for that of its session.
                if not await self._engine.rename(self._name, self._name + ENDED):
                    return  # never created, or the worker that holds the lease now has adopted it
                await self._terminate(grace)
        except (EngineError, TimeoutError) as error:
            self._session.log.critical(
                "container may still run: %r",
                error,
                extra={"container": self._name, "error": repr(error)},
            )

    async def _terminate(self, grace: float) -> None:
        ended = self._name + ENDED
        try:
            async with asyncio.timeout(0 if self._hurried else grace) as self._grace:
                await self._engine.stop(ended, grace)
        except (EngineError, TimeoutError):
            pass  # the removal kills the container
        self._grace = None
        await self._engine.remove(ended)
