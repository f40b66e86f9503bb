"""The example plugin: one handler that takes every session and returns its text."""

import asyncio

from workpool import Release, Session, handler


@handler
async def echo(session: Session) -> dict[str, str]:
    """Wait for `seconds` (1.5), then return `text` ("hello"); both are metadata of the item."""
    text = session.item.metadata.get("text", "hello")
    seconds = float(session.item.metadata.get("seconds", "1.5"))
    session.log.info("echo: %r %s", text, "redelivered" if session.redelivered else "started")
    try:
        async with asyncio.timeout(seconds):
            await (
                session.interrupted()
            )  # A real handler works here, and checks `session` from time to time.
    except TimeoutError:
        session.log.info("echo: %r done", text)
        return {"echo": text}
    if session.stopping:  # An operator stops this session: return the progress so far.
        session.log.info("echo: %r stopped", text)
        return {"echo": "stopped early"}
    # The pool ends soon: another pool starts the session again.
    raise Release("the pool is draining")
