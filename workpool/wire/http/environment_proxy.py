"""The HTTP proxy that environment variables set; its URL may contain a password."""

from __future__ import annotations

from contextlib import suppress
from urllib.request import getproxies, proxy_bypass

from yarl import URL

from workpool.errors import SettingsError


def find_proxy_for_url(url: URL) -> URL | None:
    """Return the proxy that environment variables (`HTTPS_PROXY`, `NO_PROXY`, …) set for `url`.

    The proxy is looked up once per client. aiohttp's `trust_env` would look it up for every
    request, on a thread, and refuse the Authorization header if a `.netrc` names the host.

    Raises:
        SettingsError: The proxy cannot be used; the text does not quote it.
    """
    text = getproxies().get(url.scheme)
    if not text or proxy_bypass(url.host or ""):
        return None
    with suppress(ValueError):
        proxy = URL(text if "://" in text else f"http://{text}")
        if proxy.scheme in {"http", "https"} and proxy.host:
            return proxy
    raise SettingsError((f"{url.scheme.upper()}_PROXY: not the URL of an HTTP proxy",))
