"""The fields of log records: names and types, and the ids in every record of a pool."""

from __future__ import annotations

import ast
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import workpool
from workpool.log_fields import FIELDS, PoolIds, pool_log_ids_context, pool_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(workpool.__file__).parent
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


def find_logging_calls() -> Iterator[tuple[str, ast.Call, ast.AST]]:
    """Yield the location, the AST node and the enclosing function of each logging call."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and is_logging_call(call):
                    yield f"{path.relative_to(PACKAGE)}:{call.lineno}", call, function


def is_logging_call(call: ast.Call) -> bool:
    called = call.func
    if isinstance(called, ast.Name):
        return called.id in {"log_stacks", "_warn"}
    owner = called.value if isinstance(called, ast.Attribute) else None
    name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
    return isinstance(called, ast.Attribute) and called.attr in LEVELS and name in {"log", "_log"}


def get_message_of_logging_call(call: ast.Call) -> str:
    texts = [each.value for each in call.args if isinstance(each, ast.Constant)]
    return str(texts[0]) if texts else ""


def get_field_names_of_logging_call(call: ast.Call, function: ast.AST) -> set[str]:
    """Return the names of the fields that a logging call sets."""
    if isinstance(call.func, ast.Name):
        return {each.arg for each in call.keywords if each.arg is not None}
    extra = next((each.value for each in call.keywords if each.arg == "extra"), None)
    if extra is None:
        return set()
    return {
        key.value
        for each in ast.walk(extra if isinstance(extra, ast.Dict) else function)
        if isinstance(each, ast.Dict)
        for key in each.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def test_log_schema_contains_exactly_the_fields_that_package_logs() -> None:
    found = {
        place: get_field_names_of_logging_call(call, function)
        for place, call, function in find_logging_calls()
    }
    assert len(found) > 40
    unknown = {place: names - set(FIELDS) for place, names in found.items() if names - set(FIELDS)}
    assert not unknown
    of_formatters = {"environment_id", "worker_id", "trace_id", "error_type", "stack"}
    assert set(FIELDS) == of_formatters.union(*found.values())


def test_log_messages_contain_no_fields_with_equals_sign() -> None:
    messages = {place: get_message_of_logging_call(call) for place, call, _ in find_logging_calls()}
    wrong = {place: text for place, text in messages.items() if re.search(r"=[%{]", text)}
    assert not wrong


def test_documented_schema_equals_schema_of_the_code() -> None:
    page = (PACKAGE / "docs" / "operating.md").read_text()
    section = page.partition("### Fields\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \| (text|number) \|", section, re.MULTILINE)
    documented = {name: kind for names, kind in rows for name in re.findall(r"`(\w+)`", names)}
    standard = {"time", "level", "logger", "message"}
    assert {name: kind for name, kind in documented.items() if name not in standard} == dict(FIELDS)
    assert standard <= set(documented)


@pytest.fixture
def capture_log_records() -> Iterator[list[logging.LogRecord]]:
    """Return the records of the logger `workpool.test`."""
    found: list[logging.LogRecord] = []

    class RecordCollectingLogHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    handler, logger = RecordCollectingLogHandler(), pool_logger("workpool.test")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


IDS = {"environment_id": "env_1", "worker_id": "host-1"}


def test_log_record_has_pool_ids_only_inside_block_that_sets_them(
    capture_log_records: list[logging.LogRecord],
) -> None:
    log = pool_logger("workpool.test")
    with pool_log_ids_context(IDS):
        log.warning("inside", extra={"worker_id": "given"})
    log.warning("outside")
    inside, outside = map(vars, capture_log_records)
    assert (inside["environment_id"], inside["worker_id"]) == ("env_1", "given")
    assert not set(IDS) & set(outside)


def test_logging_filter_adds_default_pool_ids_to_record_without_ids() -> None:
    record: Any = logging.makeLogRecord({})
    assert PoolIds(lambda: IDS).filter(record)
    assert record.worker_id == "host-1"


def make_opentelemetry_module_with_span(trace_id: int, *, valid: bool) -> ModuleType:
    """Return a stand-in for the module `opentelemetry.trace`, whose import would be slow."""
    module = ModuleType("opentelemetry.trace")
    span = SimpleNamespace(trace_id=trace_id, is_valid=valid)
    vars(module)["get_current_span"] = lambda: SimpleNamespace(get_span_context=lambda: span)
    return module


@pytest.mark.parametrize("valid", [True, False])
def test_log_record_has_trace_id_only_if_opentelemetry_span_is_valid(
    capture_log_records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch, *, valid: bool
) -> None:
    module = make_opentelemetry_module_with_span(0xAB, valid=valid)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", module)
    pool_logger("workpool.test").warning("hello")
    [record] = capture_log_records
    assert vars(record).get("trace_id") == ("ab".rjust(32, "0") if valid else None)


@pytest.mark.parametrize("found", [None, ModuleType("opentelemetry.trace")])
def test_log_record_has_no_trace_id_without_fully_imported_opentelemetry(
    capture_log_records: list[logging.LogRecord],
    monkeypatch: pytest.MonkeyPatch,
    found: ModuleType | None,
) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    if found is not None:
        monkeypatch.setitem(sys.modules, "opentelemetry.trace", found)
    pool_logger("workpool.test").warning("hello")
    [record] = capture_log_records
    assert "trace_id" not in vars(record)
    assert found is not None or "opentelemetry.trace" not in sys.modules


def test_log_record_has_trace_id_of_current_opentelemetry_span(
    capture_log_records: list[logging.LogRecord],
) -> None:
    trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")
    span = trace.NonRecordingSpan(trace.SpanContext(0xCD, 1, is_remote=False))
    with trace.use_span(span):
        pool_logger("workpool.test").warning("hello")
    [record] = capture_log_records
    assert vars(record)["trace_id"] == "cd".rjust(32, "0")
