"""A log line for each request to `workpool serve`, at level DEBUG.

Only the method, the path, the status and the time are logged: queries, headers and bodies may
contain secrets.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from workpool.cli.log_config import log

CLIENT_GONE: Final = 499
"""The logged status of a request whose client closed the connection before the answer."""


@web.middleware
async def log_request(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Log each request. Must be the outermost middleware, in order to log the final status.

    An event stream is logged when it ends.
    """
    started = time.monotonic()
    status = CLIENT_GONE
    try:
        response = await handler(request)
        status = response.status
    except web.HTTPException as error:
        status = error.status
        raise
    except Exception:
        status = web.HTTPInternalServerError.status_code
        raise
    else:
        return response
    finally:
        fields = {
            "method": request.method,
            "path": request.path,
            "status": status,
            "seconds": round(time.monotonic() - started, 4),
        }
        log.debug("request", extra=fields)
