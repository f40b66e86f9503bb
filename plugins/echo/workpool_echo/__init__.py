"""The example plugin: one handler that takes every session and answers with what it was sent."""

import asyncio

from workpool import Release, Session, handler


@handler
async def echo(session: Session) -> dict[str, str]:
    """Work for `seconds` (1.5), then give `text` ("hello") back; both come from the metadata."""
    text = session.item.metadata.get("text", "hello")
    seconds = float(session.item.metadata.get("seconds", "1.5"))
    session.log.info("echo: %r %s", text, "redelivered" if session.redelivered else "started")
    try:
        async with asyncio.timeout(seconds):
            await session.interrupted()  # a real handler works here, and looks up now and then
    except TimeoutError:
        session.log.info("echo: %r done", text)
        return {"echo": text}
    if session.stopping:  # an operator ends this session: say how far it got
        session.log.info("echo: %r stopped", text)
        return {"echo": "stopped early"}
    raise Release("the pool is draining")  # the pool goes away: another one starts it anew
