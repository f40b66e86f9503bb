"""Fault files: their valid contents, and the error messages for mistakes in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workpool.server import ControlPlane, ServeError
from workpool.testing import Faults
from workpool.testing.fault_plan import FaultPlan, read_fault_plan

PAGE = (Path(__file__).parents[2] / "workpool/docs/testing.md").read_text()


def fault_file(folder: Path, text: str, name: str = "faults.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_documented_fault_file_is_read_as_described(tmp_path: Path) -> None:
    [text] = [
        block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "[[fault]]" in block
    ]
    plan = read_fault_plan(fault_file(tmp_path, text))
    assert (plan.seed, plan.clock_skew) == (7, 30)
    faults = Faults(plan.seed)
    plan.add_rules_to(faults, ControlPlane())
    poll, ack, anything, heartbeat = faults.rules
    assert poll.ops == {"poll"}
    assert poll.limits == {"skip": 0, "probability": 0.1, "between": (5.0, 65.0)}
    assert ack.ops == {"ack", "heartbeat"}
    assert ack.limits == {"skip": 2, "probability": 1.0, "times": 3}
    assert len(anything.ops) == 13
    assert heartbeat.limits["times"] == 1


def test_fault_file_in_json_is_read_like_toml(tmp_path: Path) -> None:
    text = '{"fault": [{"kind": "reset", "ops": ["stop"], "between": [0, 1]}]}'
    plan = read_fault_plan(fault_file(tmp_path, text, "faults.json"))
    assert plan.fault[0].kind == "reset"
    assert plan.fault[0].make_rule_limits() == {"skip": 0, "probability": 1.0, "between": (0, 1)}


@pytest.mark.parametrize(
    "fault",
    [
        'kind = "status"\ncode = 429\nretry_after = 1',
        'kind = "status"\ncode = 502\nhtml = true\napplied = true',
        'kind = "lost"\napplied = false',
        'kind = "reset"',
        'kind = "garbled"',
        'kind = "delay"\nseconds = 1\napplied = true',
        'kind = "trickle"\nseconds = 0.1',
        'kind = "expired"',
    ],
)
def test_fault_file_may_contain_every_kind_of_fault(tmp_path: Path, fault: str) -> None:
    plan = read_fault_plan(fault_file(tmp_path, f"[[fault]]\n{fault}\n"))
    faults = Faults()
    plan.add_rules_to(faults, ControlPlane())
    assert len(faults.rules) == 1


def test_empty_fault_file_injects_no_fault(tmp_path: Path) -> None:
    assert read_fault_plan(fault_file(tmp_path, "")) == FaultPlan()


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("sead = 1", "sead: there is no such key"),
        ("[[fault]]", "fault 1: unable to extract tag"),
        ('[[fault]]\nkind = "explode"', "fault 1: input tag 'explode' found"),
        ('[[fault]]\nkind = "status"', "fault 1: code: field required"),
        ('[[fault]]\nkind = "status"\ncode = "503"', "fault 1: code: input should be a valid int"),
        ('[[fault]]\nkind = "status"\ncode = 99', "fault 1: code: input should be greater"),
        ('[[fault]]\nkind = "delay"', "fault 1: seconds: field required"),
        ('[[fault]]\nkind = "delay"\nseconds = -1', "fault 1: seconds: input should be greater"),
        ('[[fault]]\nkind = "delay"\nseconds = inf', "fault 1: seconds: input should be a finite"),
        ('[[fault]]\nkind = "lost"\ncode = 503', "fault 1: code: there is no such key"),
        ('[[fault]]\nkind = "lost"\nops = ["pol"]', "fault 1: ops: 0: input should be 'poll'"),
        ('[[fault]]\nkind = "lost"\nops = []', "fault 1: ops: list should have at least 1 item"),
        ('[[fault]]\nkind = "lost"\ntimes = 0', "fault 1: times: input should be greater"),
        ('[[fault]]\nkind = "lost"\nskip = -1', "fault 1: skip: input should be greater"),
        ('[[fault]]\nkind = "lost"\nprobability = 1.5', "fault 1: probability: input should be"),
        ('[[fault]]\nkind = "lost"\nbetween = [5, 5]', "fault 1: value error, between: the window"),
        ('[[fault]]\nkind = "lost"\nbetween = [5]', "fault 1: between: 1: field required"),
        ("[[fault]\n", "faults file: "),
    ],
)
def test_mistake_in_fault_file_is_reported_with_its_location(
    tmp_path: Path, text: str, expected_text: str
) -> None:
    with pytest.raises(ServeError, match=re.escape(expected_text)):
        read_fault_plan(fault_file(tmp_path, text))


def test_all_mistakes_in_fault_file_are_reported_at_once(tmp_path: Path) -> None:
    text = '[[fault]]\nkind = "lost"\ntimes = 0\n[[fault]]\nkind = "delay"\n'
    with pytest.raises(ServeError, match=r"fault 1: times: .*; fault 2: seconds: "):
        read_fault_plan(fault_file(tmp_path, text))


def test_unreadable_fault_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"faults file: .*: No such file"):
        read_fault_plan(tmp_path / "nowhere.toml")
    with pytest.raises(ServeError, match=r"faults file: .*: unexpected end"):
        read_fault_plan(fault_file(tmp_path, "{", "faults.json"))
    with pytest.raises(ServeError, match=r"faults file: .*: input should be a valid dict"):
        read_fault_plan(fault_file(tmp_path, "[]", "faults.json"))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ServeError, match=r"faults file: .*: 'utf-8'"):
        read_fault_plan(tmp_path / "bytes.toml")
