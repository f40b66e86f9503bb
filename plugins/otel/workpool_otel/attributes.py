"""The names of the spans' attributes.

The names of the semantic conventions are written out here: their package calls those of messaging
unstable, and may remove them in any release.
"""

from typing import Final

SYSTEM: Final = "messaging.system"
OPERATION: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
DESTINATION: Final = "messaging.destination.name"
MESSAGE: Final = "messaging.message.id"
CONVERSATION: Final = "messaging.message.conversation_id"
CLIENT: Final = "messaging.client.id"
STATUS_CODE: Final = "http.response.status_code"
ERROR: Final = "error.type"
HANDLER: Final = "workpool.handler"
ATTEMPT: Final = "workpool.attempt"
REDELIVERED: Final = "workpool.redelivered"
OUTCOME: Final = "workpool.outcome"
RETRY: Final = "workpool.retry"

SETTLES: Final = frozenset({"ack", "heartbeat", "stop"})
"""Calls that decide about the item, which the conventions call settling."""
