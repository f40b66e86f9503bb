"""`workpool scale` serves the load of a queue and the recommended number of workers.

Autoscalers read these numbers over HTTP, without a credential.
"""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.conftest import ENVIRONMENT, FORBIDDEN, LIMITED, SECONDS, TOKEN, TOKENS
from workpool.scaling import FLEET_NUMBERS
from workpool.server import ControlPlane

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.acceptance.conftest import CommandRunner, CommandStarter, RunningCommand

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

Numbers = dict[str, Any]


async def read_url_from_ready_line(command: RunningCommand) -> str:
    """Return the URL that the ready line reports, without its path."""
    word, url = (await command.wait_for_output()).split()
    assert word == "ready"
    return url.removesuffix("/scale")


async def get_status_and_body(url: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        body = await (answer.text() if url.endswith("/metrics") else answer.json())
        return answer.status, body


async def wait_for_scale_answer(
    url: str, wanted: Callable[[int, Numbers], bool]
) -> tuple[int, Numbers]:
    """Read `/scale` until the answer fulfils a condition, and return that answer."""
    async with asyncio.timeout(SECONDS):
        while True:
            status, numbers = await get_status_and_body(f"{url}/scale")
            if wanted(status, numbers):
                return status, numbers
            await asyncio.sleep(0.1)


async def test_scale_command_recommends_workers_for_waiting_and_running_items(
    start_command: CommandStarter, control_plane: ControlPlane
) -> None:
    control_plane.enqueue(5, {"do": "linger"})
    worker = await start_command("run", "handlers", "--concurrency", "2", "--prefetch", "0")
    await worker.wait_for_log("linger runs", times=2)
    command = await start_command(
        "scale", "--interval", "1", "--slots-per-worker", "2", "--max-replicas", "20"
    )
    url = await read_url_from_ready_line(command)
    status, numbers = await wait_for_scale_answer(url, lambda status, _: status == 200)
    assert status == 200
    assert list(numbers) == list(FLEET_NUMBERS)
    assert (numbers["queued"] + numbers["pending"], numbers["running"]) == (3, 2)
    assert numbers["recommended_replicas"] == 3
    assert numbers["lower_bound"] is False
    assert numbers["age_seconds"] < SECONDS

    status, text = await get_status_and_body(f"{url}/metrics")
    samples = {
        sample.name: (sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert set(samples) == {f"workpool_fleet_{key}" for key in FLEET_NUMBERS}
    labels = {"environment_id": ENVIRONMENT}
    assert samples["workpool_fleet_recommended_replicas"] == (labels, 3)
    assert await get_status_and_body(f"{url}/healthz") == (200, {"status": "healthy"})
    assert await get_status_and_body(f"{url}/readyz") == (200, {"status": "ready"})
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0


async def test_scale_command_serves_numbers_of_lost_control_plane_until_they_are_too_old(
    start_command_without_settings: CommandStarter, reserved_port: int
) -> None:
    async with ControlPlane(
        environments=(ENVIRONMENT,), tokens=TOKENS, port=reserved_port
    ) as control_plane:
        control_plane.enqueue(3)
        command = await start_command_without_settings(
            *("scale", "--interval", "1", "--max-age", "8", "--min-replicas", "1"),
            WORKPOOL_BASE_URL=control_plane.base_url,
            WORKPOOL_ENVIRONMENT_ID=ENVIRONMENT,
            WORKPOOL_TOKEN=TOKEN,
            WORKPOOL_METRICS_LISTEN="127.0.0.1:0",
        )
        url = await read_url_from_ready_line(command)
        await wait_for_scale_answer(url, lambda status, _: status == 200)
    _, numbers = await wait_for_scale_answer(url, lambda _, numbers: numbers["age_seconds"] > 2)
    assert (numbers["queued"], numbers["recommended_replicas"]) == (3, 1)
    _, stale = await wait_for_scale_answer(url, lambda status, _: status == 503)
    assert stale == {"status": "unknown", "reasons": ["the numbers are too old"]}
    assert (await get_status_and_body(f"{url}/healthz"))[0] == 200
    status, unready = await get_status_and_body(f"{url}/readyz")
    assert status == 503
    assert unready["reasons"][0].startswith("the queue cannot be read: stats: ")
    assert "workpool_fleet_queued{" not in (await get_status_and_body(f"{url}/metrics"))[1]

    again = ControlPlane(environments=(ENVIRONMENT,), tokens=TOKENS, port=reserved_port)
    async with again:
        again.enqueue(1)
        _, numbers = await wait_for_scale_answer(url, lambda status, _: status == 200)
        assert numbers["queued"] == 1
        await command.wait_for_log("queue read again")
        command.send_signal(signal.SIGINT)
        assert await command.wait_for_exit() == 0
    assert command.err.count("queue not read") == 1


async def test_serve_and_scale_commands_report_equal_numbers_to_autoscalers(
    start_command_without_settings: CommandStarter,
    run_in_process: CommandRunner,
    command_working_directory: Path,
) -> None:
    (command_working_directory / "tokens").write_text(f"{TOKEN}\n")
    (command_working_directory / "scale-tokens").write_text(f"{LIMITED} {ENVIRONMENT}\n")
    serve = await start_command_without_settings(
        *("serve", "--port", "0", "--json", "--environment", ENVIRONMENT),
        *("--token-file", "tokens", "--scale-token-file", "scale-tokens"),
    )
    base_url = json.loads(await serve.wait_for_output())["base_url"]
    variables = {
        "WORKPOOL_BASE_URL": base_url,
        "WORKPOOL_ENVIRONMENT_ID": ENVIRONMENT,
        "WORKPOOL_TOKEN": TOKEN,
        "WORKPOOL_METRICS_LISTEN": "127.0.0.1:0",
    }
    enqueued = await run_in_process(
        "work", "enqueue", "--count", "3", "--metadata", "do=linger", **variables
    )
    assert enqueued.status == 0
    worker = await start_command_without_settings(
        "run", "handlers", "--concurrency", "2", "--prefetch", "0", **variables
    )
    await worker.wait_for_log("linger runs", times=2)
    worker_url = (
        (await worker.wait_for_log("metrics served")).partition("url=")[2].partition("/metrics")[0]
    )
    _, slots = await get_status_and_body(f"{worker_url}/scale")
    assert (slots["busy"], slots["idle"], slots["claiming"]) == (2, 0, True)

    scale = await start_command_without_settings("scale", "--slots-per-worker", "2", **variables)
    _, numbers = await wait_for_scale_answer(
        await read_url_from_ready_line(scale), lambda status, _: status == 200
    )
    origin = base_url.removesuffix("/api/v1/cloud")
    url = f"{origin}/scale/{ENVIRONMENT}?slots_per_worker=2"
    _, served = await get_status_and_body(url)
    assert list(served) == list(numbers)
    assert {**served, "age_seconds": 0, "oldest_queued_seconds": 0} == {
        **numbers,
        "age_seconds": 0,
        "oldest_queued_seconds": 0,
    }
    assert (served["running"], served["recommended_replicas"]) == (2, 2)
    proxied = {"Host": "queue.example"}
    assert (await get_status_and_body(url, proxied))[0] == 401
    assert (await get_status_and_body(url, proxied | {"X-Api-Key": LIMITED}))[0] == 200
    for command in (worker, scale, serve):
        command.send_signal(signal.SIGTERM)
        if command is worker:
            # The first signal begins a drain, which would wait for endless sessions. The second
            # signal ends the process.
            command.send_signal(signal.SIGTERM)
    assert await scale.wait_for_exit() == 0
    assert await serve.wait_for_exit() == 0


async def test_scale_command_reads_all_environments_of_the_file(
    start_command_without_settings: CommandStarter,
    control_plane: ControlPlane,
    command_working_directory: Path,
) -> None:
    control_plane.enqueue(3)
    control_plane.enqueue(9, environment_id=FORBIDDEN)
    (command_working_directory / "token").write_text(TOKEN)
    (command_working_directory / "pool.toml").write_text(
        f"""
        [workpool]
        base_url = "{control_plane.base_url}"
        token_file = "token"
        concurrency = 5
        [workpool.environments.{ENVIRONMENT}]
        [workpool.environments.{FORBIDDEN}]
        concurrency = 2
        """
    )
    command = await start_command_without_settings(
        "scale", "--config", "pool.toml", "--metrics-listen", "127.0.0.1:0"
    )
    url = await read_url_from_ready_line(command)
    _, numbers = await wait_for_scale_answer(url, lambda status, _: status == 200)
    assert (numbers["unfinished"], numbers["slots_per_worker"]) == (12, 4)
    # `FORBIDDEN` has 9 items. Each worker has 2 slots for this environment, so 5 workers are
    # needed.
    assert numbers["recommended_replicas"] == 5
    _, text = await get_status_and_body(f"{url}/metrics")
    for environment_id, queued in ((ENVIRONMENT, 3), (FORBIDDEN, 9)):
        line = f'workpool_fleet_queued{{environment_id="{environment_id}"}} {queued}.0'
        assert line in text
    command.send_signal(signal.SIGTERM)
    assert await command.wait_for_exit() == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--metrics-listen", "off"), "metrics_listen: off"),
        (("--min-replicas", "3", "--max-replicas", "2"), "--min-replicas is larger"),
        (("--interval", "60", "--max-age", "10"), "--max-age is shorter"),
        (("--metrics-listen", "192.0.2.1:1"), "cannot listen on 192.0.2.1:1"),
    ],
)
async def test_scale_command_with_invalid_arguments_ends_with_status_2(
    start_command: CommandStarter, arguments: tuple[str, ...], problem: str
) -> None:
    command = await start_command("scale", *arguments)
    assert await command.wait_for_exit() == 2
    assert problem in command.err
