"""The pages that show a worker or a queue in a browser, and their security headers.

The pages load nothing from elsewhere, and their scripts write text only, never HTML: whatever an
item contains, it is shown as it is. See workpool/docs/operating.md, "The live page".
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Final

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONFINED: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""The headers of every page and of its data."""
_TYPES: Final = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_SHARED: Final = ("page.css", "page.js")


def add_page(router: web.UrlDispatcher, name: str) -> Handler:
    """Add routes for the scripts and styles of a page, and return the handler for its HTML.

    Args:
        router: The router of the application, whose paths below `/page/` are taken.
        name: `worker` or `queue`.
    """
    for file in (*_SHARED, f"{name}.js"):
        router.add_get(f"/page/{file}", _make_file_route_handler(file))
    return _make_file_route_handler(f"{name}.html")


def _make_file_route_handler(file: str) -> Handler:
    async def serve_page(_: web.Request) -> web.Response:
        body = resources.files(__name__).joinpath(file).read_bytes()
        content_type = _TYPES[file.rpartition(".")[2]]
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=CONFINED)

    return serve_page
