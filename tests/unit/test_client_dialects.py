"""The table of client dialects, compared with a literal copy."""

from __future__ import annotations

from typing import get_args

from workpool.wire import protocol
from workpool.wire.client_dialects import DIALECTS, DialectRules


def test_client_dialect_table_has_every_dialect() -> None:
    assert set(DIALECTS) == set(get_args(protocol.Dialect))


def test_qoder_dialect_rules_have_documented_values() -> None:
    assert DIALECTS["qoder"] == DialectRules(
        base_url="https://api.qoder.com/api/v1/cloud",
        credential_variable="QODER_PAT",
        api_key_header=None,
        worker_id_header="Worker-ID",
        work_query="",
        headers={},
        events_resume=True,
        metadata_limits=None,
    )


def test_anthropic_dialect_rules_have_documented_values() -> None:
    rules = DIALECTS["anthropic"]
    assert rules.base_url == "https://api.anthropic.com/v1"
    assert rules.credential_variable == "ANTHROPIC_ENVIRONMENT_KEY"
    assert rules.api_key_header == "X-Api-Key"
    assert rules.worker_id_header == "anthropic-worker-id"
    assert rules.work_query == "beta=true"
    assert dict(rules.headers) == {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "managed-agents-2026-04-01",
    }
