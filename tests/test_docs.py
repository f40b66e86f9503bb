"""The pages name each hook, alert, exit status and setting, and their examples run."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import multiprocessing.connection
import os
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from tests import references
from workpool import Session, Settings, Supervisor, WorkClient, handler, hookspecs
from workpool.cli import exits
from workpool.errors import RefusedError
from workpool.events import SessionFinished
from workpool.server import ControlPlane
from workpool.testing import Kit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiohttp import web
    from fastapi import FastAPI

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "workpool/docs"
ALERTS = (ROOT / "workpool/alerts.yml").read_text()
PAGES = [README, *sorted(DOCS.glob("*.md"))]
TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = TOML["project"], TOML["tool"]


def read_page_text(name: str) -> str:
    """Return the text of a page under `workpool/docs/`."""
    return (DOCS / name).read_text()


def relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def find_code_blocks(language: str) -> list[str]:
    """Return the distinct code blocks of all pages; two pages may show the same block."""
    text = "\n".join(each.read_text() for each in PAGES)
    pattern = rf"^```{language}\n(.*?)^```$"
    return list(dict.fromkeys(re.findall(pattern, text, re.DOTALL | re.MULTILINE)))


def find_code_block_containing(marker: str, language: str = "python") -> str:
    """Return the one code block that contains `marker`."""
    [found] = [text for text in find_code_blocks(language) if marker in text]
    return found


@pytest.mark.parametrize("name", references.PAGES)
def test_generated_part_of_documentation_page_matches_code(name: str) -> None:
    """If this test fails, `python -m tests.references` writes the pages anew."""
    assert references.replace_generated_part_of_page(
        read_page_text(name), references.PAGES[name]()
    ) == read_page_text(name)


def test_every_hook_has_a_heading_in_plugins_page() -> None:
    for name in vars(hookspecs):
        if name.startswith("workpool_"):
            assert re.search(
                rf"^## `{name}\(\w+\)`$", read_page_text("plugins.md"), re.MULTILINE
            ), name


def test_every_exit_status_is_in_documented_table() -> None:
    section = read_page_text("cli.md").partition("| exit status |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| (\d)", section, re.MULTILINE) == ["0", "1", "2", "3", "1"]
    assert {exits.OK, exits.FAILED, exits.USAGE, exits.REFUSED} == {0, 1, 2, 3}


def test_every_alert_is_in_table_of_operating_page() -> None:
    alerts = re.findall(r"alert: (\w+)", ALERTS)
    assert (
        re.findall(r"^\| \[`(Workpool\w+)`\]", read_page_text("operating.md"), re.MULTILINE)
        == alerts
    )


def test_runbook_url_of_every_alert_links_to_existing_heading() -> None:
    addresses = re.findall(r"runbook_url: (\S+)$", ALERTS, re.MULTILINE)
    [prefix] = {address.partition("#")[0] for address in addresses}
    assert f"'s#{prefix}#" in ALERTS, "the first lines show how to replace the prefix"
    alerts = re.findall(r"alert: (\w+)", ALERTS)
    assert [address.partition("#")[2] for address in addresses] == [each.lower() for each in alerts]
    headings = re.findall(r"^### (Workpool\w+)$", read_page_text("operating.md"), re.MULTILINE)
    assert headings == alerts


@pytest.mark.trial
def test_alert_rules_pass_their_unit_tests() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    command = [promtool, "test", "rules", "alerts_test.yml"]
    ended = subprocess.run(  # noqa: S603 - fixed arguments
        command, cwd=ROOT / "workpool", capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alert_fires_in_a_unit_test() -> None:
    cases = (ROOT / "workpool/alerts_test.yml").read_text()
    fired = set(re.findall(r'alertname="(\w+)"', cases))
    # Each installation sets the threshold of this alert, so no unit test can fire it.
    untested = {"WorkpoolFewerWorkers"}
    assert fired | untested == set(re.findall(r"alert: (\w+)", ALERTS))


def test_cpu_times_in_readme_equal_benchmark_results() -> None:
    table = (ROOT / "benchmarks/README.md").read_text().partition("CPU ms/item")[2]
    measured = dict(re.findall(r"^\| ([\w-]+) +\| +\d+ \| +([\d.]+) \|", table, re.MULTILINE)[:4])
    [row] = re.findall(r"^\| CPU per item.*$", README.read_text(), re.MULTILINE)
    names = ["qca-sdk", "anthropic", "workpool"]
    assert re.findall(r"\| ([\d.]+) ms", row) == [f"{float(measured[name]):.1f}" for name in names]


def test_ci_script_runs_both_test_commands_of_readme() -> None:
    commands = re.findall(r"^.* && \.venv/bin/poe \w+$", README.read_text(), re.MULTILINE)
    assert [command.rpartition(" ")[2] for command in commands] == ["check", "trials"]
    gate = (ROOT / ".ci/run").read_text().splitlines()
    for command in commands:
        # errexit ignores a failure inside an && list, so each command needs its own `|| exit`.
        assert f"{command} || exit" in gate


def test_python_versions_in_ci_script_equal_those_in_package_classifiers() -> None:
    gate = (ROOT / ".ci/run").read_text()
    [others] = re.findall(r"^for version in ([\d. ]+); do$", gate, re.MULTILINE)
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert supported == ["3.11", *others.split()]


def test_every_test_belongs_to_either_the_test_task_or_the_trials_task() -> None:
    """`poe test` runs the tests without the marker `trial`; `poe trials` runs all others."""
    assert TOOLS["pytest"]["ini_options"]["addopts"][-2:] == ["-m", "not trial"]
    tasks = TOOLS["poe"]["tasks"]
    selection = re.compile(r" -m | -k |--ignore|--deselect| tests| plugins")
    assert not selection.search(tasks["test"])
    [trials] = [step["cmd"] for step in tasks["trials"] if isinstance(step, dict)]
    assert selection.findall(trials) == [" -m "]
    assert " -m trial " in trials


def find_heading_anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("path", PAGES, ids=relative_path)
def test_link_of_page_leads_to_existing_file_and_heading(path: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.is_relative_to(ROOT), link
        assert file.exists(), link
        if anchor:
            assert anchor in find_heading_anchors(file), link


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=relative_path)
def test_page_is_reachable_from_readme(path: Path) -> None:
    assert f"]({relative_path(path)})" in README.read_text()


@pytest.fixture
async def control_plane_for_examples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[ControlPlane]:
    """Open a control plane, set environment variables for its clients, and write `reports.py`."""
    (tmp_path / "reports.py").write_text(find_code_block_containing("# reports.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    async with ControlPlane() as plane:
        monkeypatch.setenv("WORKPOOL_BASE_URL", plane.base_url)
        monkeypatch.setenv("WORKPOOL_ENVIRONMENT_ID", plane.environments[0])
        monkeypatch.setenv("QODER_PAT", plane.token)
        yield plane


def run_example(marker: str, folder: Path) -> dict[str, Any]:
    path = folder / "example.py"
    path.write_text(find_code_block_containing(marker))
    return runpy.run_path(str(path))


async def wait_for_metadata_of_finished_item(
    metadata: dict[str, str], script: list[dict[str, Any]] | None = None
) -> dict[str, str]:
    """Enqueue one item, wait until it is stopped, and return its metadata."""
    async with WorkClient(Settings()) as client:
        [item] = await client.enqueue(metadata=metadata, script=script)
        async with asyncio.timeout(20):
            while item.state != "stopped":
                await asyncio.sleep(0.02)
                item = await client.get(item.id)
    return dict(item.metadata)


async def metadata_written_by_plugin(plugin: object, metadata: dict[str, str]) -> dict[str, str]:
    async with Supervisor(Settings(), plugins=[plugin]):
        return await wait_for_metadata_of_finished_item(metadata)


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_handler_of_readme_writes_phase_and_row_count_to_item_metadata(
    tmp_path: Path,
) -> None:
    names = run_example("# reports.py", tmp_path)
    done = await metadata_written_by_plugin(names["daily_report"], {"job": "daily-report"})
    assert (done["phase"], done["rows"]) == ("fetching", "42")


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_program_with_embedded_pool_runs_sessions(tmp_path: Path) -> None:
    names = run_example("# service.py", tmp_path)
    async with asyncio.TaskGroup() as group:
        main = group.create_task(names["main"]())
        assert (await wait_for_metadata_of_finished_item({"job": "daily-report"}))["rows"] == "42"
        main.cancel()


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_handler_that_runs_blocking_code_in_thread_writes_digest(
    tmp_path: Path,
) -> None:
    names = run_example("pbkdf2_hmac", tmp_path)
    done = await metadata_written_by_plugin(names["digest_session"], {"job": "digest"})
    assert len(done["digest"]) == 64


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_scratch_file_handler_writes_byte_count_to_metadata(
    tmp_path: Path,
) -> None:
    scratch = run_example("# scratch.py", tmp_path)["scratch"]
    assert int((await metadata_written_by_plugin(scratch, {"job": "scratch"}))["bytes"]) > 10


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_handler_result_is_written_as_one_json_text(tmp_path: Path) -> None:
    totals = run_example("# totals.py", tmp_path)["totals"]
    done = await metadata_written_by_plugin(totals, {"job": "totals"})
    assert done["workpool.result"] == '{"orders":2,"amounts":[12.5,30],"currency":null}'


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_handler_with_retry_setting_is_called_until_it_returns(
    tmp_path: Path,
) -> None:
    stock = run_example("# stock.py", tmp_path)["stock"]
    done = await metadata_written_by_plugin(stock, {"job": "stock"})
    assert (done["stock"], done["retry"]) == ("7", "2")


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_handler_that_is_plain_function_writes_result(tmp_path: Path) -> None:
    resize = run_example("# resize.py", tmp_path)["resize"]
    assert (await metadata_written_by_plugin(resize, {"job": "resize"}))["resized"] == "3"


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_plugin_with_process_pool_writes_result_and_ends_processes(
    tmp_path: Path,
) -> None:
    # Each process of the example's process pool imports this module.
    (tmp_path / "primes.py").write_text(find_code_block_containing("# primes.py"))
    primes = importlib.import_module("primes").Primes
    done = await metadata_written_by_plugin(primes, {"job": "primes", "below": "100"})
    assert done["workpool.result"] == '{"primes":25}'
    # The executor's thread may reap a process first, so `join` could miss the end of the process.
    for process in multiprocessing.active_children():
        assert multiprocessing.connection.wait([process.sentinel], timeout=50)


async def test_documented_handler_uses_same_idempotency_key_in_second_run(tmp_path: Path) -> None:
    names = run_example("# pay.py", tmp_path)
    pay = names["pay"]

    @handler(metadata={"job": "pay"})
    async def pay_and_lose_lease_once(session: Session) -> dict[str, str]:
        result: dict[str, str] = await pay(session)
        if session.attempt == 1:
            kit.lose(item)
            await asyncio.sleep(10)
        return result

    async with Kit() as kit:
        [item] = kit.enqueue(metadata={"job": "pay", "amount": "7"})
        async with kit.pool(pay_and_lose_lease_once):
            outcomes = [(await kit.wait_for(SessionFinished)).outcome for _ in range(2)]
    assert outcomes == ["lease_lost", "completed"]
    assert names["bank"].payments == {item.id: 7}


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_handoff_passes_item_to_hold_command_which_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real `workpool hold` process takes the item over, runs a program, and stops the item."""
    commands = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    start, children = asyncio.create_subprocess_exec, []

    async def start_process_and_record_it(*words: Any, **given: Any) -> asyncio.subprocess.Process:
        children.append(await start(*words, **given))
        return children[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_process_and_record_it)
    apart = run_example("def apart", tmp_path)["apart"]
    assert await metadata_written_by_plugin(apart, {"job": "apart"}) == {"job": "apart"}
    async with asyncio.timeout(20):
        # The child process stops the item and exits a little later. Its exit must be awaited
        # before the event loop of this test closes.
        await children[0].wait()


async def test_documented_handler_answers_tool_uses_of_session(
    tmp_path: Path, control_plane_for_examples: ControlPlane
) -> None:
    names = run_example("async def talk(", tmp_path)
    script = json.loads(find_code_block_containing('"custom": true', "json"))
    # The handler of the example reads only entries with these two keys.
    uses = [entry for entry in script if set(entry) == {"name", "input"}]
    async with Supervisor(Settings(), plugins=[names["talk"]]):
        assert (await wait_for_metadata_of_finished_item({"job": "talk"}, uses * 3))["done"] == "3"
    control_plane_for_examples.enqueue(script=script)


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_program_with_pool_runs_sessions_until_signal(tmp_path: Path) -> None:
    names = run_example("# program.py", tmp_path)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        main = group.create_task(names["main"]())
        assert "hello, " in (await wait_for_metadata_of_finished_item({}))["greeting"]
        os.kill(os.getpid(), signal.SIGTERM)
        await main


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_pool_in_aiohttp_application_runs_sessions(tmp_path: Path) -> None:
    app: web.Application = run_example("# web_aiohttp.py", tmp_path)["app"]
    async with TestClient(TestServer(app)) as client:
        assert (await wait_for_metadata_of_finished_item({"job": "daily-report"}))["rows"] == "42"
        for path in ("/ready", "/live"):
            async with client.get(path) as answer:
                assert answer.status == 200


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_liveness_route_fails_after_pool_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QODER_PAT", "wrong")
    names = run_example("# web_aiohttp.py", tmp_path)
    app: web.Application = names["app"]
    async with TestClient(TestServer(app)) as client:
        with pytest.raises(RefusedError):
            await app[names["POOL"]].wait()
        async with client.get("/live") as answer:
            assert answer.status == 503


@pytest.mark.trial
@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_pool_in_fastapi_application_runs_sessions(tmp_path: Path) -> None:
    from httpx import ASGITransport, AsyncClient  # noqa: PLC0415 - only the trials have it

    app: FastAPI = run_example("# web_fastapi.py", tmp_path)["app"]
    async with app.router.lifespan_context(app):
        assert (await wait_for_metadata_of_finished_item({"job": "daily-report"}))["rows"] == "42"
        transport = ASGITransport(app=app)
        async with AsyncClient(transport=transport, base_url="http://embedded") as client:
            assert (await client.get("/running")).json() == 0
            assert (await client.get("/live")).status_code == 200


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_pools_with_shared_rate_limits_run_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = run_example("# two_pools.py", tmp_path)
    async with ControlPlane(environments=["env_a", "env_b"]) as plane:
        monkeypatch.setenv("WORKPOOL_BASE_URL", plane.base_url)
        monkeypatch.setenv("QODER_PAT", plane.token)
        async with asyncio.TaskGroup() as group:
            main = group.create_task(names["main"]())
            for environment in plane.environments:
                monkeypatch.setenv("WORKPOOL_ENVIRONMENT_ID", environment)
                assert (await wait_for_metadata_of_finished_item({"job": "daily-report"}))[
                    "rows"
                ] == "42"
            main.cancel()


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_database_plugin_counts_orders_and_writes_count_to_metadata(
    tmp_path: Path,
) -> None:
    with sqlite3.connect(tmp_path / "orders.db") as database:
        database.executescript("create table orders (id); insert into orders values (1), (2)")
    database.close()
    orders: Callable[[], object] = run_example("class Orders", tmp_path)["Orders"]
    assert (await metadata_written_by_plugin(orders, {"job": "count-orders"}))["orders"] == "2"


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_observer_prints_outcome(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = run_example("class Audit", tmp_path)["Audit"]
    async with Supervisor(Settings(), plugins=[audit, "reports"]):
        await wait_for_metadata_of_finished_item({"job": "daily-report"})
    assert "reports.daily_report completed" in capsys.readouterr().out


@pytest.mark.usefixtures("control_plane_for_examples")
async def test_documented_handlers_receive_items_whose_metadata_match_their_rules(
    tmp_path: Path,
) -> None:
    names = run_example("# kinds.py", tmp_path)
    async with Supervisor(
        Settings(), plugins=[names["Heavy"], names["report"], names["huge_report"]]
    ):
        for more, by in [
            ({}, "report"),
            ({"size": "huge"}, "huge_report"),
            ({"weight": "101"}, "move_heavy"),
        ]:
            assert (await wait_for_metadata_of_finished_item({"job": "report", **more}))["by"] == by


def test_documented_tests_of_handlers_pass_when_pytest_runs_them(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(reports=find_code_block_containing("# reports.py"))
    for name in ("test_reports", "test_approval", "test_export", "test_answering", "test_count"):
        pytester.makepyfile(**{name: find_code_block_containing(f"# {name}.py")})
    result = pytester.runpytest_inprocess("-p", "pytest_workpool")
    result.assert_outcomes(passed=7)


def read_glossary_entries() -> list[list[str]]:
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (.+?) \|$", read_page_text("glossary.md"), re.MULTILINE
    )
    return [list(row) for row in rows if row[0] != "term"]


def code_name_exists(path: str) -> bool:
    """Return whether a dotted name exists in the package `workpool`.

    A name that begins with `tests.` is looked up in the package `tests` instead.
    """
    module, names = "workpool", path.split(".")
    if names[0] == "tests":
        module = names.pop(0)
    found: Any = importlib.import_module(module)
    for name in names:
        try:
            found = importlib.import_module(f"{module}.{name}")
            module = f"{module}.{name}"
        except ModuleNotFoundError:
            # `hasattr` finds no instance attributes on a class, so search the source of the class.
            if not hasattr(found, name):
                source = inspect.getsource(found) if inspect.isclass(found) else ""
                return (
                    re.search(rf"\bself\.{name}\b|^    {name}:", source, re.MULTILINE) is not None
                )
            found = getattr(found, name)
    return True


def test_code_name_in_every_glossary_entry_exists_in_source() -> None:
    for term, _, code in read_glossary_entries():
        [path] = re.findall(r"`([\w.]+)`", code)
        assert code_name_exists(path), (term, path)


def test_glossary_check_rejects_name_that_the_code_does_not_define() -> None:
    assert not code_name_exists("pool.lease.Lease.no_such_name")
    assert not code_name_exists("pool.no_such_module")


def test_every_glossary_term_has_one_entry_of_one_sentence() -> None:
    terms = [term for term, *_ in read_glossary_entries()]
    assert len(terms) == len(set(terms)) > 40
    assert all(re.fullmatch(r"[A-Z][^.]*\.", each) for _, each, _ in read_glossary_entries())


def test_documented_names_of_builtin_tools_are_lower_case() -> None:
    """Workers of other vendors know the built-in tools by lower-case names only."""
    builtin = {"bash", "read", "write", "edit", "glob", "grep"}
    documents = [*PAGES, *ROOT.glob("plugins/*/*.md")]
    names = [
        name for path in documents for name in re.findall(r'"name": "(\w+)"', path.read_text())
    ]
    found = [name for name in names if name.lower() in builtin]
    assert found
    assert [name for name in found if not name.islower()] == []
