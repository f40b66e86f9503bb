"""Which HTTP proxy the environment names. What it names may hold a password: it is never quoted."""

from __future__ import annotations

from contextlib import suppress
from urllib.request import getproxies, proxy_bypass

from yarl import URL

from workpool.errors import SettingsError


def proxy_of(url: URL) -> URL | None:
    """The proxy that the environment names for `url` (`HTTPS_PROXY`, `NO_PROXY`, …).

    Looked up once per client. aiohttp's `trust_env` would do it for every request, on a thread,
    and refuse our Authorization header wherever a `.netrc` names the host.

    Raises:
        SettingsError: It cannot be used; it is not quoted, as it may hold a password.
    """
    text = getproxies().get(url.scheme)
    if not text or proxy_bypass(url.host or ""):
        return None
    with suppress(ValueError):
        proxy = URL(text if "://" in text else f"http://{text}")
        if proxy.scheme in {"http", "https"} and proxy.host:
            return proxy
    raise SettingsError((f"{url.scheme.upper()}_PROXY: not the URL of an HTTP proxy",))
