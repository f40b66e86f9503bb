"""Tests of `workpool.errors`."""

from typing import get_args

import pytest

from workpool.errors import Reason, TransientError

APPLIED_NEVER = {"not_sent", "throttled"}


@pytest.mark.parametrize("reason", get_args(Reason))
def test_reason_of_transient_error_shows_whether_request_may_have_been_applied(
    reason: Reason,
) -> None:
    error = TransientError("stop", None, "x", reason=reason)
    assert error.may_be_applied == (reason not in APPLIED_NEVER)
