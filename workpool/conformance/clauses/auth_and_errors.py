"""Clauses about authentication, unknown environments, and the form of errors.

See workpool/docs/protocol.md, "Conventions".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from workpool.conformance.clause import clause
from workpool.conformance.verdict import raise_clause_differs_unless

if TYPE_CHECKING:
    from workpool.conformance.clause_trial import ClauseTrial

UNKNOWN: Final = "0" * 32


@clause("auth-missing", "A request without a token is answered with 401.")
async def check_request_without_token_is_refused(trial: ClauseTrial) -> None:
    """Send an ack without a token for an unknown item, so that an accepted ack has no effect."""
    answer = await trial.api.copy_as_worker(None, None).ack(f"work_{UNKNOWN}")
    raise_clause_differs_unless(
        answer.status == HTTPStatus.UNAUTHORIZED, f"{answer}: no token is needed"
    )


@clause("auth-wrong", "A request with an unknown token is answered with 401.")
async def check_request_with_unknown_token_is_refused(trial: ClauseTrial) -> None:
    """Acknowledge an unknown item with an unknown token."""
    answer = await trial.api.copy_as_worker(None, "workpool-conform-no-token").ack(
        f"work_{UNKNOWN}"
    )
    raise_clause_differs_unless(
        answer.status == HTTPStatus.UNAUTHORIZED, f"{answer}: any token is accepted"
    )


@clause("environment-unknown", "An unknown environment is a 404.")
async def check_unknown_environment_is_not_found(trial: ClauseTrial) -> None:
    """Poll an environment that does not exist."""
    answer = await trial.api("GET", trial.api.work_url("/poll", f"env_{UNKNOWN}"))
    raise_clause_differs_unless(answer.status == HTTPStatus.NOT_FOUND, str(answer))


@clause("error-envelope", "An error has the fields `type`, `error.type` and `error.message`.")
async def check_error_has_documented_fields(trial: ClauseTrial) -> None:
    """Acknowledge an unknown item, and check the body of the error 404."""
    answer = await trial.api.ack(f"work_{UNKNOWN}")
    whole = answer.get("type") == "error"
    known = all(isinstance(answer.error.get(name), str) for name in ("type", "message"))
    raise_clause_differs_unless(
        whole and known, f"HTTP {answer.status} without the fields of an error"
    )
