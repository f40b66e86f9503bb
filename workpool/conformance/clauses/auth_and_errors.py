"""Authentication and errors.

See workpool/docs/protocol.md, "Conventions".
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

from workpool.conformance.clause import clause
from workpool.conformance.verdict import same_or_differs

if TYPE_CHECKING:
    from workpool.conformance.trial import Trial

UNKNOWN: Final = "0" * 32


@clause("auth-missing", "A request without a token is answered with 401.")
async def request_without_token(trial: Trial) -> None:
    """Acknowledge an unknown item without a token, so that nothing happens if it is accepted."""
    answer = await trial.api.as_worker(None, None).ack(f"work_{UNKNOWN}")
    same_or_differs(answer.status == HTTPStatus.UNAUTHORIZED, f"{answer}: no token is needed")


@clause("auth-wrong", "A request with an unknown token is answered with 401.")
async def request_with_unknown_token(trial: Trial) -> None:
    """Acknowledge an unknown item with an unknown token."""
    answer = await trial.api.as_worker(None, "workpool-conform-no-token").ack(f"work_{UNKNOWN}")
    same_or_differs(answer.status == HTTPStatus.UNAUTHORIZED, f"{answer}: any token is accepted")


@clause("environment-unknown", "An unknown environment is a 404.")
async def unknown_environment(trial: Trial) -> None:
    """Poll an environment that does not exist."""
    answer = await trial.api("GET", trial.api.work("/poll", f"env_{UNKNOWN}"))
    same_or_differs(answer.status == HTTPStatus.NOT_FOUND, str(answer))


@clause("error-envelope", "An error has the fields `type`, `error.type` and `error.message`.")
async def error_envelope(trial: Trial) -> None:
    """Read the body of a 404."""
    answer = await trial.api.ack(f"work_{UNKNOWN}")
    whole = answer.get("type") == "error"
    known = all(isinstance(answer.error.get(name), str) for name in ("type", "message"))
    same_or_differs(whole and known, f"HTTP {answer.status} without the fields of an error")
