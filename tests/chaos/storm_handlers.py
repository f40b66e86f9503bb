"""The handlers of a chaos test, which record the start and the end of each run in a file."""

from __future__ import annotations

import asyncio
import json
import os
import time

from workpool import Release, Session, handler

STEP_SECONDS = 0.1
_TRACE = os.open(os.environ["STORM_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def write_trace_line(session: Session, what: str) -> None:
    """Write one line to the trace with one system call, so that a kill cannot truncate it."""
    now = time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    line = {"t": now, "pid": os.getpid(), "work_id": session.item.id, "what": what}
    os.write(_TRACE, json.dumps(line).encode() + b"\n")


@handler
async def work_and_end_as_requested(session: Session) -> dict[str, str]:
    """Work for `seconds`, and then end as `end` says; both values are metadata of the item."""
    metadata = session.item.metadata
    write_trace_line(session, "start")
    how = "cancelled"
    try:
        for half in ("first", "second"):
            # One long sleep would be over when a suspended process resumes. After short sleeps, the
            # resumed handler still has work and a metadata write to do.
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
        write_trace_line(session, how)
    return {"done": "yes"}
