"""The names of the attributes that spans have.

The names of the semantic conventions are written out here, because their package may remove those
of messaging, which are unstable, in any release.
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

SETTLE_CALLS: Final = frozenset({"ack", "heartbeat", "stop"})
"""The calls that change the state of the item, which the conventions call settling."""
