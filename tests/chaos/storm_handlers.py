"""Handlers of the storm's workers, which write down the start and the end of their work."""

from __future__ import annotations

import asyncio
import json
import os
import time

from workpool import Release, Session, handler

STEP_SECONDS = 0.1
_TRACE = os.open(os.environ["STORM_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(session: Session, what: str) -> None:
    """Write one line atomically, so that a kill cannot cut it."""
    now = time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    line = {"t": now, "pid": os.getpid(), "work_id": session.item.id, "what": what}
    os.write(_TRACE, json.dumps(line).encode() + b"\n")


@handler
async def work(session: Session) -> dict[str, str]:
    """Work for `seconds` with a record half-way, and then end as `end` says."""
    metadata = session.item.metadata
    note(session, "start")
    how = "cancelled"
    try:
        for half in ("first", "second"):
            # In small steps: time in which the process is suspended does not count as work, so that
            # the handler still has work and a record to write when it resumes.
            for _ in range(round(float(metadata["seconds"]) / 2 / STEP_SECONDS)):
                await asyncio.sleep(STEP_SECONDS)
            if metadata["end"] == "write":
                await session.update_metadata({"half": half})
        how = "raised"
        if metadata["end"] == "fail":
            raise RuntimeError("as it was asked to")
        if metadata["end"] == "release" and not session.redelivered:
            raise Release("for somebody else", delay=10)
        how = "returned"
    finally:
        note(session, how)
    return {"done": "yes"}
