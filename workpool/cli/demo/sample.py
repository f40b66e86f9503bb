"""The handler that `workpool demo` runs if the command line names no plugin."""

import asyncio

from workpool.handlers import handler
from workpool.session import Release, Session


@handler
async def sample(session: Session) -> dict[str, str]:
    """Wait for the seconds in the metadata `seconds`, then return the metadata `text`."""
    text = session.item.metadata.get("text", "hello")
    session.log.info("sample: %r %s", text, "redelivered" if session.redelivered else "started")
    try:
        async with asyncio.timeout(float(session.item.metadata.get("seconds", "1.5"))):
            await session.interrupted()
    except TimeoutError:
        session.log.info("sample: %r done", text)
        return {"sample": text}
    raise Release("interrupted")
