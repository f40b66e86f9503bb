"""Runs the conformance suite, which checks whether an environment obeys the protocol's clauses.

The run has a time limit.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from workpool.conformance.api import NoAnswerError
from workpool.conformance.clause_trial import ClauseTrial
from workpool.conformance.shared_queue import ForeignItemsError, SharedQueue
from workpool.conformance.verdict import ClauseNotConfirmedError, Verdict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from workpool.conformance.api import WorkerApi
    from workpool.conformance.clause import Clause
    from workpool.conformance.work_sources import ItemSource

SUITE_SECONDS: Final = 280.0
CLEAN_UP_SECONDS: Final = 15.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one clause. `seen` is the observation, or empty if the clause holds."""

    clause: Clause
    verdict: Verdict
    seen: str = ""


class Suite(SharedQueue):
    """Checks clauses of the protocol against one environment, most of them concurrently.

    Args:
        api: Sends the requests of a worker.
        source: Creates the items that the clauses need.
        creator: Sends the requests that create items, if the key of `api` may not create items;
            None: `api` sends them.
        given: Ids of existing items of the environment that the suite may claim and stop.
        test_environment: Whether the suite may claim and stop every item of the environment.
        seconds: Time limit for checking all clauses; the clean-up after a clause may exceed it.
        now: Returns seconds of a monotonic clock.
        sleep: Waits for seconds; tests pass a function that moves their clock.
    """

    def __init__(  # noqa: PLR0913 - one keyword for each option of `workpool conform`
        self,
        api: WorkerApi,
        source: ItemSource,
        *,
        creator: WorkerApi | None = None,
        given: Iterable[str] = (),
        test_environment: bool = False,
        seconds: float = SUITE_SECONDS,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(
            api,
            source,
            creator=creator,
            given=given,
            test_environment=test_environment,
            now=now,
            sleep=sleep,
        )
        self._seconds = seconds

    async def run(self, clauses: Iterable[Clause]) -> list[Finding]:
        """Check the clauses, and return one finding for each clause, in the order of `clauses`.

        Raises:
            ForeignItemsError: The environment has items that the suite may not have created.
            NoAnswerError: The control plane does not answer.
        """
        clauses = list(clauses)
        await self.check_that_items_are_of_suite()
        deadline = asyncio.get_running_loop().time() + self._seconds
        found: dict[str, Finding] = {}

        async def record_finding(clause: Clause) -> None:
            found[clause.name] = await self.check_clause(clause, deadline)

        try:
            async with asyncio.TaskGroup() as group:
                for clause in clauses:
                    if clause.when == "together":
                        group.create_task(record_finding(clause), name=f"clause-{clause.name}")
        except* ForeignItemsError as errors:
            foreign = errors.exceptions[0]
            raise foreign from None
        for clause in clauses:
            if clause.when == "last":
                await record_finding(clause)
        return [found[clause.name] for clause in clauses]

    async def check_clause(self, clause: Clause, deadline: float | None = None) -> Finding:
        """Check one clause, for no longer than until `deadline` on the event loop's clock."""
        trial = ClauseTrial(self)
        try:
            async with asyncio.timeout_at(deadline):
                await trial.wait_for_start_permit()
                # `timeout_at` raises only at an await. If the deadline passed during the wait for
                # the permit, `sleep` raises before the check sends its first request.
                await asyncio.sleep(0)
                await clause.check(trial)
        except ClauseNotConfirmedError as departure:
            return Finding(clause, departure.verdict, str(departure))
        except NoAnswerError as error:
            return Finding(clause, Verdict.UNTRIED, str(error))
        except TimeoutError:
            return Finding(clause, Verdict.UNTRIED, "the time of the whole suite was used up")
        finally:
            trial.release_start_permit()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._compute_clean_up_deadline(deadline)):
                    await trial.clean_up()
        return Finding(clause, Verdict.HOLDS)

    @staticmethod
    def _compute_clean_up_deadline(deadline: float | None) -> float:
        now = asyncio.get_running_loop().time()
        return CLEAN_UP_SECONDS + (now if deadline is None else deadline)
