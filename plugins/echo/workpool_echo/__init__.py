"""The example plugin: a handler that takes every session and returns a text from the metadata."""

import asyncio

from workpool import Release, Session, handler


@handler
async def echo(session: Session) -> dict[str, str]:
    """Wait `seconds` (default 1.5) and return `text` (default "hello"), both from the metadata."""
    text = session.item.metadata.get("text", "hello")
    seconds = float(session.item.metadata.get("seconds", "1.5"))
    session.log.info("echo: %r %s", text, "redelivered" if session.redelivered else "started")
    try:
        async with asyncio.timeout(seconds):
            # A real handler does its work here, and checks `session` from time to time.
            await session.interrupted()
    except TimeoutError:
        session.log.info("echo: %r done", text)
        return {"echo": text}
    # An operator has requested the stop of this session: return the result so far.
    if session.stopping:
        session.log.info("echo: %r stopped", text)
        return {"echo": "stopped early"}
    # The pool drains: the released item is delivered again, to another pool.
    raise Release("the pool is draining")
