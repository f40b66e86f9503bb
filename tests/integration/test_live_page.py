"""The live page of a worker: its data, what it hides, and the page in a real browser.

See workpool/docs/operating.md, "The live page".
"""

from __future__ import annotations

import asyncio
import re
import shutil
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from workpool import Session, handler
from workpool.events import SessionFinished, SessionStarted
from workpool.pages import CONFINED

if TYPE_CHECKING:
    from pathlib import Path

    from workpool import Supervisor
    from workpool.server import ControlPlane
    from workpool.testing import Recorder

HTML = {"Accept": "text/html"}


@handler
async def work(session: Session) -> None:
    await session.interrupted()


async def fetch(url: str, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        body = await (answer.json() if url.endswith(".json") else answer.text())
        return answer.status, answer.headers, body


async def live(pool: Supervisor, headers: dict[str, str] | None = None) -> dict[str, Any]:
    status, _, body = await fetch(f"{pool.metrics_url}/live.json", headers)
    assert status == 200
    shown: dict[str, Any] = body
    return shown


async def test_live_status_shows_slots_sessions_polls_and_outcomes(
    plane: ControlPlane, make_pool: Any, recorder: Recorder
) -> None:
    (item,) = plane.enqueue(metadata={"secret": "of the customer"})
    may_end = asyncio.Event()

    @handler
    async def wait(_: Session) -> None:
        await may_end.wait()

    async with make_pool(wait, metrics_listen="127.0.0.1:0", concurrency=3) as pool:
        await recorder.wait_for(SessionStarted)
        shown = await live(pool)
        assert shown["slots"]["busy"] == 1
        assert shown["slots"]["limit"] == 3
        assert shown["polls"]["item"] == 1
        assert shown["polls"]["answers"] >= 1
        assert shown["leases"]["held"] == 1
        assert shown["leases"]["shortest_seconds"] > 30
        (session,) = shown["sessions"]
        assert (session["work_id"], session["session_id"]) == (item.id, item.session_id)
        assert (session["handler"], session["attempt"]) == ("wait.wait", 1)
        assert "of the customer" not in str(shown)
        may_end.set()
        await recorder.wait_for(SessionFinished)
        shown = await live(pool)
        assert shown["outcomes"]["completed"] == 1
        assert shown["sessions"] == []


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
async def test_ids_are_shown_on_loopback_only_unless_a_setting_says_so(
    plane: ControlPlane,
    make_pool: Any,
    recorder: Recorder,
    address: tuple[str, str],
    host: str,
    visible: str,
) -> None:
    (item,) = plane.enqueue()
    listen, setting = address
    async with make_pool(work, metrics_listen=listen, live_page_ids=setting) as pool:
        await recorder.wait_for(SessionStarted)
        shown = await live(pool, {"Host": host})
        (session,) = shown["sessions"]
        assert (session.get("work_id") == item.id) == (visible == "ids")
        assert (item.session_id in str(shown)) == (visible == "ids")
        assert session["handler"] == "work.work"


async def test_page_and_its_parts_are_confined_and_load_nothing_from_elsewhere(
    make_pool: Any,
) -> None:
    async with make_pool(work, metrics_listen="127.0.0.1:0") as pool:
        url = f"{pool.metrics_url}/"
        status, headers, page = await fetch(url, HTML)
        assert status == 200
        parts = re.findall(r'(?:src|href)="(page/[^"]+)"', page)
        assert parts == ["page/page.css", "page/worker.js"]
        for name, value in CONFINED.items():
            assert headers[name] == value
        for part in (*parts, "page/page.js"):
            status, headers, text = await fetch(url + part)
            assert status == 200
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert "http" not in text
            assert "innerHTML" not in text
        assert "http" not in page


async def test_index_stays_plain_text_for_clients_that_are_no_browsers(make_pool: Any) -> None:
    async with make_pool(work, metrics_listen="127.0.0.1:0") as pool:
        status, _, text = await fetch(f"{pool.metrics_url}/")
        assert status == 200
        assert text.startswith("workpool\n")


async def in_browser(url: str, folder: Path, *options: str) -> str:
    """Return the page after its scripts have run, as headless Chromium serialises it."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    process = await asyncio.create_subprocess_exec(
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000"),
        *(*options, url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return out.decode()


@pytest.mark.trial
@pytest.mark.timeout(120)
async def test_page_shows_sessions_as_text_in_a_browser(
    plane: ControlPlane, make_pool: Any, recorder: Recorder, tmp_path: Path
) -> None:
    (item,) = plane.enqueue()
    async with make_pool(work, metrics_listen="127.0.0.1:0") as pool:
        await recorder.wait_for(SessionStarted)
        pool.pause("<img src=x onerror=alert(1)> disk full")
        page = await in_browser(f"{pool.metrics_url}/", tmp_path, "--dump-dom")
    assert item.session_id in page
    assert "not ready" in page
    assert "paused: &lt;img src=x onerror=alert(1)&gt; disk full" in page
    assert "<img" not in page
