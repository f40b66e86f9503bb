"""Runs one session in a container: starts or adopts the container, logs its output, removes it.

A session never runs twice at once. The worker writes the id of a container to the item's metadata,
which needs the lease, before it starts the container; other containers of the item are never
adopted. The *name* of a container contains a random word that only its worker knows. A worker
adopts a container, or gives it up, by renaming it from the name that this worker knows. A worker
that has lost its lease can therefore not stop a container that another worker has adopted. See
plugins/container/README.md, "Adoption".
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
from workpool_container.engine_client import GIVEN_UP_SUFFIX, EngineError
from workpool_container.options import WORK_ID_LABEL, container_specification
from workpool_container.output_log import OutputLog

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workpool import Session
    from workpool_container.engine_client import EngineClient, ListedContainer
    from workpool_container.options import ContainerOptions

CONTAINER_ID_KEY: Final = "workpool.container"
"""The key of the item's metadata whose value is the id of the only valid container."""
SIGKILL_EXIT_STATUS: Final = 128 + signal.SIGKILL
"""The exit status of a container that was killed by SIGKILL."""
CANCELLED_GRACE_SECONDS: Final = 2.0
"""Seconds between stop signal and SIGKILL for a cancelled session. The last step of a drain has 5 s
in all."""
LOST_LEASE_GRACE_SECONDS: Final = 0.5
"""Seconds between stop signal and SIGKILL after a lost lease. Another worker may start the item
after the margin of 1 s."""
REMOVAL_SECONDS: Final = 2.0
"""The time limit of the engine's calls that remove the container after the grace, in seconds."""
LAST_LINES_SECONDS: Final = 5.0
"""The time limit for the rest of the output after the exit, in seconds."""
OUTPUT_RETRY_SECONDS: Final = 1.0
"""The pause before the output is read again after an error, in seconds."""
ADOPTED_OUTPUT_LINES: Final = 100
"""The number of earlier output lines of an adopted container that are logged again."""
RELEASE_DELAY_SECONDS: Final = 30.0
"""The delay of the next delivery of an item whose container could not be started, in seconds."""


class ContainerFailed(WorkpoolError):
    """The exit status of the container means failure, or another program removed the container.

    Attributes:
        status: The exit status, or None if it is unknown.
    """

    def __init__(self, container: str, problem: str, status: int | None = None) -> None:
        super().__init__(f"container {container:.12}: {problem}")
        self.status = status


class ContainerRun:
    """Runs the container of one session. Each call of the handler creates a `ContainerRun`."""

    def __init__(
        self,
        engine: EngineClient,
        options: ContainerOptions,
        session: Session,
        extra_variables: Mapping[str, str] | None = None,
        *,
        reads_all_output: bool = False,
    ) -> None:
        """Store the arguments. `run_container` starts the container.

        Args:
            engine: The engine.
            options: The settings of the plugin.
            session: The session.
            extra_variables: Further environment variables of the container.
            reads_all_output: Whether output is read after the limit of logged lines, because each
                line of output counts as progress of the session.
        """
        self._extra_variables = extra_variables
        self._reads_all_output = reads_all_output
        self._engine = engine
        self._options = options
        self._session = session
        self._name = f"workpool-{session.item.id}-{secrets.token_hex(4)}"
        self._id = ""
        self._stop_signal_sent = False
        self._without_grace = False
        self._grace_timeout: asyncio.Timeout | None = None

    async def run_container(self) -> dict[str, str]:
        """Run the container of the session to its end, and return metadata for the item.

        Raises:
            Release: The exit status is 75, the engine does not start the container, or the
                container is left running for adoption.
            ContainerFailed: The exit status is neither 0 nor 75, or another program removed the
                container.
        """
        try:
            adopted = await self._adopt_or_start_container()
            return await self._metadata_from_exit_status(await self._wait_for_exit(adopted=adopted))
        except (asyncio.CancelledError, Exception) as error:
            # After a cancellation, or if memory or descriptors are exhausted, another worker may
            # receive the item. The container must not run then.
            if isinstance(error, asyncio.CancelledError) or exhausted(error):
                await self._remove_own_container()
            raise

    def _container_log_fields(self) -> dict[str, str]:
        return {"container_id": self._id[:12]}

    async def _adopt_or_start_container(self) -> bool:
        """Adopt the item's container or start a new one. Return whether a container was adopted."""
        try:
            adopted = await self._adopt_container()
            if not adopted:
                await self._start_container()
        except (WorkpoolError, Release) as error:
            await self._remove_own_container()
            if not isinstance(error, EngineError | TransientError):
                raise
            # Release the item, because a worker with another engine may succeed. No container has
            # run.
            self._session.log.warning(
                "container not started: %s", error, extra={"error": str(error)}
            )
            raise Release("the container could not be started", RELEASE_DELAY_SECONDS) from error
        return adopted

    async def _adopt_container(self) -> bool:
        """Adopt a valid container of the item, if there is one, and remove all other containers."""
        item = self._session.item
        adopted = False
        for listed in await self._engine.list_containers(WORK_ID_LABEL, item.id):
            self._raise_if_lease_ended()
            if self._is_adoptable(listed) and await self._engine.rename_container(
                listed.name, self._name
            ):
                self._id, adopted = listed.id, True
                self._session.log.info(
                    "container adopted",
                    extra={"container_id": listed.id[:12], "state": listed.state},
                )
            else:
                self._raise_if_lease_ended()
                await self._engine.remove_container(listed.id)
        return adopted

    def _raise_if_lease_ended(self) -> None:
        """Raise `Release` if the lease has ended: another worker may own the container by now.

        A worker that was suspended for longer than its lease runs for a moment before its pool
        detects the lost lease.
        """
        if not self._session.lease_remaining:
            raise Release("the lease has ended")

    def _is_adoptable(self, listed: ListedContainer) -> bool:
        named = self._session.item.metadata.get(CONTAINER_ID_KEY) == listed.id
        return named and listed.was_started and not listed.is_marked_for_removal

    async def _start_container(self) -> None:
        specification = container_specification(self._options, self._session, self._extra_variables)
        try:
            self._id = await self._engine.create_container(self._name, specification)
        except EngineError as error:
            if not error.is_not_found or self._options.pull == "never":
                raise
            # Pull the image again, because it was removed from the engine after the start of the
            # pool.
            await self._engine.pull_image(self._options.image)
            self._id = await self._engine.create_container(self._name, specification)
        await self._session.update_metadata({CONTAINER_ID_KEY: self._id})
        self._raise_if_lease_ended()
        await self._engine.start_container(self._id)
        self._session.log.info("container started", extra=self._container_log_fields())

    async def _wait_for_exit(self, *, adopted: bool) -> int:
        try:
            async with asyncio.TaskGroup() as group:
                output = group.create_task(
                    self._log_output(adopted=adopted), name="container-output"
                )
                stopper = group.create_task(
                    self._stop_container_when_interrupted(), name="container-interrupted"
                )
                status = await self._engine.wait_for_exit_status(self._id)
                stopper.cancel()
                await asyncio.wait({output}, timeout=LAST_LINES_SECONDS)
                output.cancel()
        except BaseExceptionGroup as group_error:
            error = innermost(group_error)
            if isinstance(error, EngineError):
                error = ContainerFailed(self._id, "was removed by another program")
            raise error from error.__cause__
        return status

    async def _log_output(self, *, adopted: bool) -> None:
        output = OutputLog(self._session.log, self._options.log_lines, self._session.progress)
        tail = str(ADOPTED_OUTPUT_LINES) if adopted else "all"
        while self._reads_all_output or not output.has_reached_line_limit:
            try:
                async with aclosing(self._engine.container_output(self._id, tail)) as chunks:
                    async for stream, chunk in chunks:
                        output.add_chunk(stream, chunk)
                        if output.has_reached_line_limit and not self._reads_all_output:
                            return
            except EngineError as error:
                self._session.log.warning(
                    "container output interrupted: %s", error, extra={"error": str(error)}
                )
                await asyncio.sleep(OUTPUT_RETRY_SECONDS)
                # After an error, read only lines that are written from now on. Some lines may then
                # be missing in the log, but no line is logged twice.
                tail = "0"
            else:
                output.log_unfinished_lines()
                return

    async def _stop_container_when_interrupted(self) -> None:
        """Wait for a stop request or a drain. Then stop the container, or leave it for adoption.

        Raises:
            Release: The pool drains, and the setting `on_drain` is `leave`.
        """
        session = self._session
        await session.interrupted()
        if not session.stopping and self._options.on_drain == "leave":
            session.log.info("container left for adoption", extra=self._container_log_fields())
            raise Release("its container runs on, to be adopted")
        session.log.info("container gets a stop signal", extra=self._container_log_fields())
        self._stop_signal_sent = True
        try:
            await self._engine.stop_container(self._id, self._options.grace)
        except EngineError as error:
            # Only log the error. If the container does not exist anymore, `wait_for_exit_status`
            # also raises an error. If the engine does not answer, the pool cancels the handler
            # after `stop_grace`.
            session.log.warning("container not stopped: %s", error, extra={"error": str(error)})

    async def _metadata_from_exit_status(self, status: int) -> dict[str, str]:
        self._session.log.info(
            "container ended", extra={**self._container_log_fields(), "status": status}
        )
        if status == 0 or self._session.stopping:
            return {"exit_status": str(status)}
        if status == os.EX_TEMPFAIL or self._stop_signal_sent:
            # Remove the ended container. Otherwise the next run of the item would adopt it and
            # report its exit status instead of starting a new container.
            await self._remove_own_container()
            raise Release(f"exit status {status}")
        killed = " (SIGKILL: was it out of memory?)" if status == SIGKILL_EXIT_STATUS else ""
        raise ContainerFailed(self._id, f"exit status {status}{killed}", status)

    async def _remove_own_container(self) -> None:
        """Stop and remove the container, even if the handler is cancelled a second time.

        A second cancellation ends the grace at once, and is raised after the removal.
        """
        second_cancellation: asyncio.CancelledError | None = None
        async with asyncio.TaskGroup() as group:
            removal = group.create_task(
                self._rename_and_remove_container(), name="container-clean-up"
            )
            while not removal.done():
                try:
                    await asyncio.wait({removal})
                except asyncio.CancelledError as error:
                    second_cancellation = error
                    self._skip_remaining_grace()
        if second_cancellation is not None:
            raise second_cancellation

    def _skip_remaining_grace(self) -> None:
        self._without_grace = True
        if self._grace_timeout is not None and not self._grace_timeout.expired():
            self._grace_timeout.reschedule(asyncio.get_running_loop().time())

    async def _rename_and_remove_container(self) -> None:
        """Rename this worker's container so that no worker can adopt it, then stop and remove it.

        The time of all calls is limited. The engine may still carry out a cancelled create or
        start. The removal waits for a start in progress; a container that the engine creates later
        is never started.
        """
        grace = (
            CANCELLED_GRACE_SECONDS if self._session.lease_remaining else LOST_LEASE_GRACE_SECONDS
        )
        try:
            async with asyncio.timeout(grace + REMOVAL_SECONDS):
                # Rename the container before its stop. Otherwise another worker could adopt it, and
                # report the exit status that the stop causes as the result of the session.
                if not await self._engine.rename_container(
                    self._name, self._name + GIVEN_UP_SUFFIX
                ):
                    # Nothing to remove: the container was not created, or another worker has
                    # adopted it.
                    return
                await self._stop_and_remove_renamed_container(grace)
        except (EngineError, TimeoutError) as error:
            self._session.log.critical(
                "container may still run: %r",
                error,
                extra={"container": self._name, "error": repr(error)},
            )

    async def _stop_and_remove_renamed_container(self, grace: float) -> None:
        given_up_name = self._name + GIVEN_UP_SUFFIX
        try:
            async with asyncio.timeout(0 if self._without_grace else grace) as self._grace_timeout:
                await self._engine.stop_container(given_up_name, grace)
        except (EngineError, TimeoutError):
            pass  # The removal below kills a container that was not stopped.
        self._grace_timeout = None
        await self._engine.remove_container(given_up_name)
