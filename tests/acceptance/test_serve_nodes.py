"""Several `workpool serve` processes on one PostgreSQL database, behind a load balancer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.acceptance.conftest import ENVIRONMENT, TOKEN
from tests.chaos.balancer import Balancer
from workpool.conformance import CLAUSES

if TYPE_CHECKING:
    from tests.acceptance.conftest import CommandStarter

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(420)]


@pytest.mark.parametrize("dialect", ["qoder", "anthropic"])
async def test_two_servers_behind_balancer_fulfil_every_clause_of_conformance_suite(
    start_command_without_settings: CommandStarter,
    database_url: str,
    reserved_port: int,
    dialect: str,
) -> None:
    addresses = []
    for _ in range(2):
        command = await start_command_without_settings(
            *("serve", "--port", "0", "--environment", ENVIRONMENT, "--json"),
            WORKPOOL_SERVE_STORE=database_url,
            WORKPOOL_SERVE_TOKEN=TOKEN,
        )
        ready = json.loads(await command.wait_for_output())
        addresses.append(ready["base_url" if dialect == "qoder" else "anthropic_base_url"])
    nodes = [urlsplit(address).port or 0 for address in addresses]
    async with Balancer(reserved_port, nodes):
        conform = await start_command_without_settings(
            *("conform", addresses[0].replace(f":{nodes[0]}", f":{reserved_port}")),
            *("--dialect", dialect, "--environment-id", ENVIRONMENT, "--json"),
            WORKPOOL_TOKEN=TOKEN,
            ANTHROPIC_API_KEY=TOKEN,
        )
        status = await conform.wait_for_exit(360)
    report = json.loads(conform.out)
    broken = [clause for clause in report["clauses"] if clause["verdict"] != "holds"]
    assert (broken, status) == ([], 0)
    assert len(report["clauses"]) == len(CLAUSES)
