"""The status page of a worker ("live page"): its data, what it hides, and how a browser shows it.

See workpool/docs/operating.md, "The live page".
"""

from __future__ import annotations

import asyncio
import re
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from workpool import Session, handler
from workpool.events import SessionFinished, SessionStarted
from workpool.pages import CONFINED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from workpool import Supervisor
    from workpool.server import ControlPlane
    from workpool.testing import Recorder

HTML = {"Accept": "text/html"}


@handler
async def wait_for_interruption(session: Session) -> None:
    await session.interrupted()


async def fetch_page(url: str, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        body = await (answer.json() if url.endswith(".json") else answer.text())
        return answer.status, answer.headers, body


async def fetch_live_status(
    pool: Supervisor, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    status, _, body = await fetch_page(f"{pool.metrics_url}/live.json", headers)
    assert status == 200
    shown: dict[str, Any] = body
    return shown


async def test_live_status_shows_slots_sessions_polls_and_outcomes(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    (item,) = control_plane.enqueue(metadata={"secret": "of the customer"})
    may_end = asyncio.Event()

    @handler
    async def wait_in_handler(_: Session) -> None:
        await may_end.wait()

    async with make_pool(wait_in_handler, metrics_listen="127.0.0.1:0", concurrency=3) as pool:
        await recorder.wait_for(SessionStarted)
        shown = await fetch_live_status(pool)
        assert shown["slots"]["busy"] == 1
        assert shown["slots"]["limit"] == 3
        assert shown["polls"]["item"] == 1
        assert shown["polls"]["answers"] >= 1
        assert shown["leases"]["held"] == 1
        assert shown["leases"]["shortest_seconds"] > 30
        (session,) = shown["sessions"]
        assert (session["work_id"], session["session_id"]) == (item.id, item.session_id)
        assert (session["handler"], session["attempt"]) == ("wait_in_handler.wait_in_handler", 1)
        assert "of the customer" not in str(shown)
        may_end.set()
        await recorder.wait_for(SessionFinished)
        async with asyncio.timeout(20):
            # The session disappears from the status page shortly after SessionFinished.
            while (shown := await fetch_live_status(pool))["sessions"]:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
        assert shown["outcomes"]["completed"] == 1


@pytest.mark.parametrize(
    ("address", "host", "visible"),
    [
        (("127.0.0.1:0", "loopback"), "127.0.0.1", "ids"),
        (("127.0.0.1:0", "loopback"), "localhost:9464", "ids"),
        (("127.0.0.1:0", "loopback"), "[::1]:9464", "ids"),
        (("127.0.0.1:0", "loopback"), "attacker.example", "no ids"),
        (("127.0.0.1:0", "loopback"), "attacker.example:9464", "no ids"),
        (("0.0.0.0:0", "loopback"), "127.0.0.1", "no ids"),
        (("0.0.0.0:0", "always"), "worker.example", "ids"),
    ],
)
async def test_live_page_shows_ids_to_other_hosts_only_if_configured(
    control_plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    address: tuple[str, str],
    host: str,
    visible: str,
) -> None:
    (item,) = control_plane.enqueue()
    listen, setting = address
    async with make_pool(
        wait_for_interruption, metrics_listen=listen, live_page_ids=setting
    ) as pool:
        await recorder.wait_for(SessionStarted)
        shown = await fetch_live_status(pool, {"Host": host})
        (session,) = shown["sessions"]
        assert (session.get("work_id") == item.id) == (visible == "ids")
        assert (item.session_id in str(shown)) == (visible == "ids")
        assert session["handler"] == "wait_for_interruption.wait_for_interruption"


async def test_live_page_has_security_headers_and_loads_nothing_from_other_hosts(
    make_pool: Any,
) -> None:
    async with make_pool(wait_for_interruption, metrics_listen="127.0.0.1:0") as pool:
        url = f"{pool.metrics_url}/"
        status, headers, page = await fetch_page(url, HTML)
        assert status == 200
        parts = re.findall(r'(?:src|href)="(page/[^"]+)"', page)
        assert parts == ["page/page.css", "page/worker.js"]
        for name, value in CONFINED.items():
            assert headers[name] == value
        for part in (*parts, "page/page.js"):
            status, headers, text = await fetch_page(url + part)
            assert status == 200
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert "http" not in text
            assert "innerHTML" not in text
        assert "http" not in page


async def test_index_page_is_plain_text_for_clients_other_than_browsers(make_pool: Any) -> None:
    async with make_pool(wait_for_interruption, metrics_listen="127.0.0.1:0") as pool:
        status, _, text = await fetch_page(f"{pool.metrics_url}/")
        assert status == 200
        assert text.startswith("workpool\n")


class Browser:
    """One page of headless Chromium, driven through its debugging port."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._sent = 0

    async def call_devtools_method(self, method: str, **params: object) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._sent:
                return message["result"]

    async def open_page(self, url: str) -> None:
        """Open a page and wait until it is complete."""
        await self.call_devtools_method("Page.navigate", url=url)
        await self.wait_for_text("document.readyState", "complete")

    async def run_page_script(self, script: str) -> Any:
        """Run a script in the page and return its value."""
        message = await self.call_devtools_method(
            "Runtime.evaluate", expression=script, returnByValue=True
        )
        return message["result"].get("value")

    async def wait_for_text(self, script: str, part: str) -> str:
        """Run a script repeatedly until its value contains `part`; return the value."""
        async with asyncio.timeout(30):
            while True:
                value = str(await self.run_page_script(script))
                if part in value:
                    return value
                await asyncio.sleep(0.1)


@asynccontextmanager
async def headless_browser(folder: Path) -> AsyncIterator[Browser]:
    """Start headless Chromium with a page and end it afterwards."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    process = await asyncio.create_subprocess_exec(
        *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={folder / 'profile'}"),
        *("--remote-debugging-port=0", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession() as http:
            assert process.stderr is not None
            port = ""
            # Chromium prints the port: "DevTools listening on ws://127.0.0.1:PORT/…".
            async for line in process.stderr:
                if found := re.search(rb"ws://127\.0\.0\.1:(\d+)/", line):
                    port = found[1].decode()
                    break
            async with http.get(f"http://127.0.0.1:{port}/json") as answer:
                pages = [each for each in await answer.json() if each["type"] == "page"]
            async with http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Browser(socket)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_live_page_in_browser_shows_sessions_and_escapes_markup(
    control_plane: ControlPlane, make_pool: Any, recorder: Recorder, tmp_path: Path
) -> None:
    (item,) = control_plane.enqueue()
    async with make_pool(wait_for_interruption, metrics_listen="127.0.0.1:0") as pool:
        await recorder.wait_for(SessionStarted)
        pool.pause("<img src=x onerror=alert(1)> disk full")
        async with headless_browser(tmp_path) as browser:
            await browser.open_page(f"{pool.metrics_url}/")
            await browser.wait_for_text(
                "document.getElementById('sessions').textContent", item.session_id
            )
            shown = await browser.run_page_script("document.body.textContent")
            assert "not ready" in shown
            assert "paused: <img src=x onerror=alert(1)> disk full" in shown
            assert await browser.run_page_script("document.images.length") == 0


async def test_queue_page_is_served_without_token_and_contains_no_item(
    control_plane: ControlPlane,
) -> None:
    (item,) = control_plane.enqueue()
    url = control_plane.base_url.partition("/api/")[0] + "/"
    status, headers, page = await fetch_page(url, HTML)
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    parts = re.findall(r'(?:src|href)="(page/[^"]+)"', page)
    assert parts == ["page/page.css", "page/queue.js"]
    texts = [page, *[(await fetch_page(url + part))[2] for part in (*parts, "page/page.js")]]
    for text in texts:
        assert item.id not in text
        assert control_plane.environments[0] not in text
        assert "innerHTML" not in text


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_queue_page_in_browser_shows_items_after_token_is_entered(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    """The token is entered through the browser's debugging port, since no URL may contain it."""
    (item,) = control_plane.enqueue(work_type="<img src=x onerror=alert(1)>")
    url = control_plane.base_url.partition("/api/")[0] + "/"
    async with headless_browser(tmp_path) as browser:
        await browser.open_page(url)
        await browser.run_page_script(
            f"document.getElementById('environment').value = {control_plane.environments[0]!r};"
            f"document.getElementById('token').value = {control_plane.token!r};"
            "document.querySelector('#opener button').click()"
        )
        shown = await browser.wait_for_text("document.getElementById('items').textContent", item.id)
        assert "<img src=x onerror=alert(1)>" in shown
        assert await browser.run_page_script("document.querySelectorAll('#items img').length") == 0
        assert control_plane.token not in await browser.run_page_script("document.body.textContent")
