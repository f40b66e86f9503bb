"""The conformance suite, which checks any control plane against the protocol, in both dialects.

Each clause of the protocol page is one coroutine in `clauses`. A `Suite` runs them against one
environment; the same clauses run against the embedded control plane in this project's own tests.
See workpool/docs/protocol.md, "Conformance".
"""

from workpool.conformance.api import Answer, WorkerApi
from workpool.conformance.clause import Clause
from workpool.conformance.clauses import CLAUSES
from workpool.conformance.shared_queue import ForeignItemsError, ItemListRefusedError
from workpool.conformance.suite import Finding, Suite
from workpool.conformance.verdict import (
    ClauseBrokenError,
    ClauseDiffersError,
    ClauseUntriedError,
    Verdict,
)
from workpool.conformance.work_sources import (
    EnqueuedItemSource,
    ExistingItemSource,
    ItemSource,
    SessionSource,
)

__all__ = [
    "CLAUSES",
    "Answer",
    "Clause",
    "ClauseBrokenError",
    "ClauseDiffersError",
    "ClauseUntriedError",
    "EnqueuedItemSource",
    "ExistingItemSource",
    "Finding",
    "ForeignItemsError",
    "ItemListRefusedError",
    "ItemSource",
    "SessionSource",
    "Suite",
    "Verdict",
    "WorkerApi",
]
