"""The headers, queries and limits of requests in each dialect of the protocol, as a table.

Answers are parsed in the same way in both dialects.
See workpool/docs/protocol.md, "Dialects".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from workpool.wire import protocol


@dataclass(frozen=True, slots=True)
class MetadataLimits:
    """The limits of an item's metadata: number of pairs, characters of a key and of a value."""

    pairs: int
    key_characters: int
    value_characters: int


@dataclass(frozen=True, slots=True)
class DialectRules:
    """The headers, queries and limits of requests in one dialect of the protocol.

    Attributes:
        base_url: The service's own address, used if `base_url` is not set.
        credential_variable: The environment variable in which the service's users keep their token.
        api_key_header: The header that holds `api_key`; None = `Authorization`, as for the token.
        worker_id_header: The header with the name of the worker.
        work_query: Added to the query of every work call; may be empty.
        headers: Sent with every request.
        events_resume: Whether a list of events can begin after a given event, not only at a page.
        metadata_limits: The documented limits of metadata; None: none are documented.
    """

    base_url: str
    credential_variable: str
    api_key_header: str | None
    worker_id_header: str
    work_query: str
    headers: Mapping[str, str]
    events_resume: bool
    metadata_limits: MetadataLimits | None


DIALECTS: Final[Mapping[protocol.Dialect, DialectRules]] = MappingProxyType(
    {
        protocol.QODER: DialectRules(
            base_url=protocol.QODER_BASE_URL,
            credential_variable="QODER_PAT",
            api_key_header=None,
            worker_id_header=protocol.WORKER_ID_HEADER,
            work_query="",
            headers=MappingProxyType({}),
            events_resume=True,
            metadata_limits=None,
        ),
        protocol.ANTHROPIC: DialectRules(
            base_url=protocol.ANTHROPIC_BASE_URL,
            credential_variable="ANTHROPIC_ENVIRONMENT_KEY",
            api_key_header="X-Api-Key",
            worker_id_header=protocol.ANTHROPIC_WORKER_ID_HEADER,
            work_query="beta=true",
            headers=MappingProxyType(
                {
                    "anthropic-version": protocol.ANTHROPIC_VERSION,
                    "anthropic-beta": protocol.ANTHROPIC_BETA,
                }
            ),
            events_resume=False,
            metadata_limits=MetadataLimits(pairs=16, key_characters=64, value_characters=512),
        ),
    }
)
