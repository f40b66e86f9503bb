"""Right and wrong handlers, for type checkers.

mypy checks this page with the rest of the project. It also reports a `type: ignore` that suppresses
nothing, so that each wrong handler must be an error. Nothing imports this module.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NoReturn, TypedDict

from workpool import JSON, BlockingSession, Release, Retry, Session, handler


class ReportTypedDict(TypedDict):
    rows: int
    pages: list[str]


@dataclass
class OrderDataclass:
    amount: int


@handler
async def handler_returning_nothing(session: Session) -> None:
    session.log.info("done")


@handler(metadata={"job": "a"})
async def handler_returning_strings(session: Session) -> dict[str, str]:
    return {"id": session.id}


@handler
async def handler_returning_a_mapping_or_nothing(session: Session) -> Mapping[str, str] | None:
    return None if session.redelivered else {}


@handler(timeout=60)
async def handler_returning_json(session: Session) -> JSON:
    return {"rows": [1, 2.5, "three", {"four": None}], "id": session.id}


@handler
async def handler_returning_a_list_of_mappings(session: Session) -> list[dict[str, str]]:
    return [{"id": session.id}]


@handler
async def handler_returning_a_tuple(session: Session) -> tuple[int, str]:
    return session.attempt, session.id


@handler
async def handler_returning_a_sequence(session: Session) -> Sequence[int | None]:
    return [session.attempt, None]


@handler
async def handler_returning_a_number_or_a_text(session: Session) -> int | str:
    return session.attempt or session.id


@handler
async def handler_returning_a_typed_dict(session: Session) -> ReportTypedDict:
    return {"rows": session.attempt, "pages": []}


@handler
async def handler_returning_typed_dicts(_: Session) -> list[ReportTypedDict]:
    return []


@handler
async def handler_returning_a_dataclass_as_a_dict(_: Session) -> dict[str, Any]:
    return asdict(OrderDataclass(7))


@handler
async def handler_always_releasing(session: Session) -> NoReturn:
    raise Release("not yet", delay=60 * session.attempt)


@handler(retry=Retry(on=(ConnectionError, TimeoutError), times=5))
async def handler_retried_after_errors(session: Session) -> int:
    return session.retry


@handler
async def handler_with_an_optional_parameter(
    session: Session, scale: float = 1.0
) -> dict[str, float]:
    return {session.id: scale}


@handler
def plain_handler(session: BlockingSession) -> dict[str, list[float]]:
    return {session.id: [session.lease_remaining]}


@handler(timeout=60)
def plain_handler_with_timeout(session: BlockingSession) -> JSON:
    return {"done": session.update_metadata({"phase": "done"}).metadata["phase"]}


@handler
def plain_handler_returning_nothing(session: BlockingSession) -> None:
    session.cancelled.wait(1)


class ClassWithHandlers:
    @handler
    def plain_method(self, session: BlockingSession) -> list[str]:
        return [event["id"] for event in session.events.list()]

    @handler
    async def async_method(self, session: Session) -> dict[str, int]:
        return {"rows": session.attempt}

    @handler(max_sessions=2)
    async def method_with_arguments(self, session: Session) -> JSON:
        return [session.id]

    @classmethod
    @handler
    async def class_method(cls, _: Session) -> bool:
        return True

    @staticmethod
    @handler
    async def static_method(session: Session) -> str:
        return session.id


@handler  # type: ignore[type-var] # bytes
async def wrong_handler_returning_bytes(_: Session) -> bytes:
    return b""


@handler(timeout=1)  # type: ignore[type-var] # bytes in a mapping
async def wrong_handler_returning_a_mapping_of_bytes(_: Session) -> dict[str, bytes]:
    return {}


@handler  # type: ignore[type-var] # bytes in a list
async def wrong_handler_returning_a_list_of_bytes(_: Session) -> list[bytes]:
    return []


@handler  # type: ignore[type-var] # a set
async def wrong_handler_returning_a_set(_: Session) -> set[str]:
    return set()


@handler  # type: ignore[type-var] # keys that are no strings
async def wrong_handler_returning_a_mapping_of_numbers(_: Session) -> dict[int, str]:
    return {}


@handler  # type: ignore[type-var] # a dataclass
async def wrong_handler_returning_a_dataclass(_: Session) -> OrderDataclass:
    return OrderDataclass(7)


@handler  # type: ignore[type-var] # a time
async def wrong_handler_returning_a_time(session: Session) -> datetime | None:
    return session.item.created_at


@handler  # type: ignore[type-var] # anything
async def wrong_handler_returning_an_object(session: Session) -> object:
    return session


@handler  # type: ignore[type-var] # an async generator
async def wrong_handler_yielding_strings(session: Session) -> AsyncIterator[str]:
    yield session.id


@handler  # type: ignore[type-var] # not the session
async def wrong_handler_taking_a_text(_: str) -> None: ...


@handler  # type: ignore[type-var] # no parameter
async def wrong_handler_without_parameter() -> None: ...


@handler  # type: ignore[type-var] # a second parameter without a default
async def wrong_handler_taking_a_second_argument(_: Session, rows: int) -> dict[str, int]:
    return {"rows": rows}


@handler  # type: ignore[type-var] # a plain `def` has a blocking session
def wrong_plain_handler_with_async_session(_: Session) -> None: ...


@handler  # type: ignore[type-var] # an `async def` has a session
async def wrong_async_handler_with_blocking_session(_: BlockingSession) -> None: ...


@handler  # type: ignore[type-var] # bytes
def wrong_plain_handler_returning_bytes(_: BlockingSession) -> bytes:
    return b""


@handler  # type: ignore[type-var] # a generator
def wrong_plain_handler_yielding_strings(session: BlockingSession) -> Iterator[str]:
    yield session.id


def function_with_wrong_arguments_for_decorator() -> None:
    handler(timeout="60")  # type: ignore[call-overload] # a text
    handler(retry=3)  # type: ignore[call-overload] # a number
    handler(retry=Retry(on=KeyboardInterrupt))  # type: ignore[arg-type] # not an Exception


class ClassWithWrongHandlers:
    @handler  # type: ignore[type-var] # no session
    async def wrong_method_without_session_parameter(self) -> None: ...

    @handler(timeout=1)  # type: ignore[type-var] # a dataclass
    async def wrong_method_returning_a_dataclass(self, _: Session) -> OrderDataclass:
        return OrderDataclass(7)


async def function_that_calls_a_handler(session: Session) -> list[dict[str, str]]:
    return [await handler_returning_strings(session)]


async def function_with_wrong_type_for_handler_result(session: Session) -> int:
    return await handler_returning_strings(session)  # type: ignore[return-value] # a mapping of strings
