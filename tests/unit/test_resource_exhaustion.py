"""Errors that show an exhausted resource (descriptors, memory, disk) release the session."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from workpool import Release, release_on_exhaustion
from workpool.errors import TransientError, exhausted


def make_error_caused_by(cause: Exception) -> Exception:
    error = ValueError("x")
    error.__cause__ = cause
    return error


def make_error_with_context(context: Exception) -> Exception:
    error = ValueError("x")
    error.__context__ = context
    return error


FULL = OSError(errno.ENOSPC, "x")


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(getattr(errno, name), "x") for name in ("EMFILE", "ENFILE", "EDQUOT", "EAGAIN")),
        *(OSError(errno.ENOMEM, "x"), FULL, MemoryError(), BlockingIOError(errno.EAGAIN, "x")),
        *(
            RuntimeError("can't start new thread"),
            make_error_caused_by(FULL),
            make_error_caused_by(make_error_caused_by(FULL)),
            make_error_caused_by(make_error_with_context(FULL)),
        ),
        ExceptionGroup("x", [ValueError(), ExceptionGroup("y", [make_error_caused_by(FULL)])]),
    ],
    ids=repr,
)
def test_release_on_exhaustion_turns_error_caused_by_exhausted_resource_into_release(
    error: Exception,
) -> None:
    assert exhausted(error)
    with pytest.raises(Release) as raised, release_on_exhaustion():
        raise error
    assert raised.value.__cause__ is error
    assert exhausted(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("x"), OSError("no number"), OSError(errno.EACCES, "x"), RuntimeError("x")),
        *(OSError([errno.ENOSPC], "made by a handler"), ExceptionGroup("x", [ValueError()])),
        TransientError("stop", 503, "x", reason="server_error"),
    ],
    ids=repr,
)
def test_error_not_caused_by_exhausted_resource_is_raised_unchanged(error: Exception) -> None:
    assert not exhausted(error)
    with pytest.raises(type(error)) as raised, release_on_exhaustion():
        raise error
    assert raised.value is error


def test_error_with_cyclic_chain_of_causes_does_not_count_as_exhausted_resource() -> None:
    one, two = ValueError(), KeyError()
    one.__context__, two.__context__ = two, one
    assert not exhausted(one)


def test_release_exception_with_exhausted_resource_as_cause_keeps_reason_and_delay() -> None:
    with pytest.raises(Release) as raised, release_on_exhaustion():
        raise Release("later", delay=60) from FULL
    assert (raised.value.reason, raised.value.delay) == ("later", 60)


def test_thread_that_cannot_start_is_recognised_as_exhausted_resource() -> None:
    """Python raises a RuntimeError, and only its text shows that a thread could not start."""
    program = """
import resource, threading
from workpool.errors import exhausted
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
threading.stack_size(1 << 30)
try:
    threading.Thread(target=print).start()
except RuntimeError as error:
    print(exhausted(error), error)
"""
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=True
    )
    assert done.stdout == "True can't start new thread\n"
