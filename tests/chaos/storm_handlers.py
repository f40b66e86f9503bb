"""What the workers of the storm run: work that writes down when it began and how it ended."""

from __future__ import annotations

import asyncio
import json
import os
import time

from workpool import Release, Session, handler

STEP_SECONDS = 0.1
_TRACE = os.open(os.environ["STORM_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(session: Session, what: str) -> None:
    """One line, whole or not at all, whoever is killed."""
    now = time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    line = {"t": now, "pid": os.getpid(), "work_id": session.item.id, "what": what}
    os.write(_TRACE, json.dumps(line).encode() + b"\n")


@handler
async def work(session: Session) -> dict[str, str]:
    """Take `seconds`, with a sign of life half-way, and then do as `end` says."""
    metadata = session.item.metadata
    note(session, "start")
    how = "cancelled"
    try:
        for half in ("first", "second"):
            # In small steps: time in which the process is stopped is not time worked, so that
            # there is work left, and a word to send, when it wakes.
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
