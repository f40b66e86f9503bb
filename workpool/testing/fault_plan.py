"""Faults from a file, for manual tests: `workpool serve --faults FILE`.

See workpool/docs/testing.md, "Faults in manual tests".

The module defines the format of the file. The conditions of faults are in `fault_rules`, their
effects in `fault`. A file with any mistake is refused: a typo must not look like a server without
faults.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workpool.server import ServeError
from workpool.testing import fault as effects
from workpool.testing.fault_rules import RuleLimits

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, Self

    from workpool.server import ControlPlane
    from workpool.testing.fault_rules import Faults

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _StrictFileModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _FaultEntry(_StrictFileModel):
    """One fault of a faults file: the keys that select the calls to which it applies.

    The keys have the meaning of the keys of `fault_rules.RuleLimits`.
    """

    ops: Annotated[list[effects.Op], Field(min_length=1)] | None = None
    times: Annotated[int, Field(ge=1)] | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    between: Annotated[tuple[_Seconds, _Seconds], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _validate_time_window(self) -> Self:
        if self.between is not None and self.between[0] >= self.between[1]:
            raise ValueError("between: the window must end after it begins")
        return self

    def make_rule_limits(self) -> RuleLimits:
        limits = RuleLimits(skip=self.skip, probability=self.probability)
        if self.times is not None:
            limits["times"] = self.times
        if self.between is not None:
            limits["between"] = self.between
        return limits


class _HttpStatusFaultEntry(_FaultEntry):
    kind: Literal["status"]
    code: Annotated[int, Field(ge=300, le=599)]
    retry_after: _Seconds | str | None = None
    html: bool = False
    applied: bool = False

    def make_fault(self, _plane: ControlPlane) -> effects.Fault:
        return effects.status(
            self.code, retry_after=self.retry_after, html=self.html, applied=self.applied
        )


class _LostAnswerFaultEntry(_FaultEntry):
    kind: Literal["lost", "reset", "garbled"]
    applied: bool = True

    def make_fault(self, _plane: ControlPlane) -> effects.Fault:
        makers = {"lost": effects.lost, "reset": effects.reset, "garbled": effects.garbled}
        return makers[self.kind](applied=self.applied)


class _DelayFaultEntry(_FaultEntry):
    kind: Literal["delay"]
    seconds: _Seconds
    applied: bool = False

    def make_fault(self, _plane: ControlPlane) -> effects.Fault:
        return effects.delay(self.seconds, applied=self.applied)


class _SlowAnswerFaultEntry(_FaultEntry):
    kind: Literal["trickle"]
    seconds: _Seconds

    def make_fault(self, _plane: ControlPlane) -> effects.Fault:
        return effects.trickle(self.seconds)


class _ExpiredLeaseFaultEntry(_FaultEntry):
    kind: Literal["expired"]

    def make_fault(self, plane: ControlPlane) -> effects.Fault:
        return effects.expired(plane)


class FaultPlan(_StrictFileModel):
    """The content of a faults file.

    Attributes:
        seed: The seed of the probabilities.
        clock_skew: Seconds by which the control plane's clock is ahead of the machine's.
        fault: The faults, in the order of the file and of `Faults.add`.
    """

    seed: int = 0
    clock_skew: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    fault: list[
        Annotated[
            _HttpStatusFaultEntry
            | _LostAnswerFaultEntry
            | _DelayFaultEntry
            | _SlowAnswerFaultEntry
            | _ExpiredLeaseFaultEntry,
            Field(discriminator="kind"),
        ]
    ] = []

    @property
    def needs_in_memory_queue(self) -> bool:
        """Whether the plan works only with a server that keeps its queue in memory.

        Such a plan moves the clock or ends leases. With PostgreSQL, both are in the database.
        """
        return self.clock_skew != 0 or any(
            isinstance(each, _ExpiredLeaseFaultEntry) for each in self.fault
        )

    def add_rules_to(self, faults: Faults, plane: ControlPlane) -> None:
        """Inject the faults of the plan into calls of the control plane from now on."""
        for each in self.fault:
            faults.add(each.make_fault(plane), *(each.ops or ()), **each.make_rule_limits())


_WORDING: Final = {"Extra inputs are not permitted": "there is no such key"}


def read_fault_plan(path: Path) -> FaultPlan:
    """Read a faults file: JSON if its name ends with `.json`, else TOML.

    Raises:
        ServeError: The file cannot be read, or is wrong. Names all mistakes with their places.
    """
    try:
        content = path.read_bytes()
        found: Any = (
            orjson.loads(content) if path.suffix == ".json" else tomllib.loads(content.decode())
        )
    except OSError as error:
        raise ServeError(f"faults file: {path}: {error.strerror}") from None
    except ValueError as error:  # The content of the file is not UTF-8, JSON or TOML.
        raise ServeError(f"faults file: {path}: {error}") from None
    try:
        return FaultPlan.model_validate(found)
    except ValidationError as error:
        problems = [_describe_mistake_in_file(each["loc"], each["msg"]) for each in error.errors()]
        raise ServeError(f"faults file: {path}: {'; '.join(problems)}") from None


def _describe_mistake_in_file(place: tuple[int | str, ...], message: str) -> str:
    """Describe one mistake in a faults file, as in `fault 2: code: field required`."""
    words = [str(part) for part in place]
    if len(place) > 1 and isinstance(place[1], int):
        # Pydantic gives the place of a mistake as ("fault", index, kind, key...). Leave out `kind`:
        # readers of the message would take it for a key of the file.
        words = [f"{place[0]} {place[1] + 1}", *words[3:]]
    return ": ".join([*words, _WORDING.get(message, message[:1].lower() + message[1:])])
