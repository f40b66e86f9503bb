"""The names and constants of the protocol, shared by the worker and the embedded control plane.

Imports nothing and holds no behaviour: client and server implement the protocol independently, and
the literal JSON in `tests/protocol` decides between them.
See workpool/docs/protocol.md, "Protocol".
"""

from typing import Final, Literal

State = Literal["queued", "starting", "active", "stopping", "stopped"]
QUEUED: Final = "queued"
STARTING: Final = "starting"
ACTIVE: Final = "active"
STOPPING: Final = "stopping"
STOPPED: Final = "stopped"
STATES: Final[tuple[State, ...]] = (QUEUED, STARTING, ACTIVE, STOPPING, STOPPED)

WORK: Final = "work"
SESSION: Final = "session"
HEALTHCHECK: Final = "healthcheck"
WORK_HEARTBEAT: Final = "work_heartbeat"
WORK_QUEUE_STATS: Final = "work_queue_stats"

BLOCK_MS_MIN: Final = 1
BLOCK_MS_MAX: Final = 999
RECLAIM_OLDER_THAN_MS: Final = 5000
"""The control plane's own reclaim window, used if a poll gives none."""

NO_HEARTBEAT: Final = "NO_HEARTBEAT"
TTL_MIN_SECONDS: Final = 10
TTL_MAX_SECONDS: Final = 600
TTL_DEFAULT_SECONDS: Final = 60
ACK_LEASE_SECONDS: Final = 60
"""The length in seconds of the lease that an ack begins."""

LIST_LIMIT_DEFAULT: Final = 20
LIST_LIMIT_MAX: Final = 100

WORKERS_POLLING_WINDOW_SECONDS: Final = 30

USER_MESSAGE: Final = "user.message"
USER_INTERRUPT: Final = "user.interrupt"
USER_TOOL_RESULT: Final = "user.tool_result"
USER_CUSTOM_TOOL_RESULT: Final = "user.custom_tool_result"
USER_TOOL_CONFIRMATION: Final = "user.tool_confirmation"
AGENT_MESSAGE: Final = "agent.message"
AGENT_TOOL_USE: Final = "agent.tool_use"
AGENT_CUSTOM_TOOL_USE: Final = "agent.custom_tool_use"
AGENT_TOOL_RESULT: Final = "agent.tool_result"
STATUS_RUNNING: Final = "session.status_running"
STATUS_IDLE: Final = "session.status_idle"
STATUS_TERMINATED: Final = "session.status_terminated"
THREAD_TERMINATED: Final = "session.thread_status_terminated"
SESSION_DELETED: Final = "session.deleted"
REQUIRES_ACTION: Final = "requires_action"
END_TURN: Final = "end_turn"
LAST_EVENT_ID_HEADER: Final = "Last-Event-ID"
KEEP_ALIVE_SECONDS: Final = 10
"""Longest silence in seconds of an event stream of the embedded control plane."""

OUR_METADATA: Final = "workpool."
"""The prefix of all metadata keys that workpool writes."""
OUR_ERROR: Final = "workpool.error"
"""The metadata key for the error with which a worker stopped the item."""
OUR_RETRY: Final = "workpool.retry_of"
"""The metadata key for the id of the item that `workpool work retry` has copied to this one."""

ENQUEUE_COUNT_MAX: Final = 1000

BODY_LIMIT_BYTES: Final = 4 * 1024 * 1024
ANSWER_LIMIT_BYTES: Final = 4 * 1024 * 1024
"""Largest answer that a worker reads, in bytes; an answer about events may be larger."""
ID_PATTERN: Final = r"[A-Za-z0-9_-]{1,128}"

INVALID_REQUEST_ERROR: Final = "invalid_request_error"
AUTHENTICATION_ERROR: Final = "authentication_error"
PERMISSION_ERROR: Final = "permission_error"
NOT_FOUND_ERROR: Final = "not_found_error"
CONFLICT_ERROR: Final = "conflict_error"
PRECONDITION_FAILED_ERROR: Final = "precondition_failed_error"
RATE_LIMIT_ERROR: Final = "rate_limit_error"
API_ERROR: Final = "api_error"

Dialect = Literal["qoder", "anthropic"]
QODER: Final = "qoder"
ANTHROPIC: Final = "anthropic"
QODER_BASE_URL: Final = "https://api.qoder.com/api/v1/cloud"
ANTHROPIC_BASE_URL: Final = "https://api.anthropic.com/v1"
WORKER_ID_HEADER: Final = "Worker-ID"
ANTHROPIC_WORKER_ID_HEADER: Final = "anthropic-worker-id"
ANTHROPIC_VERSION: Final = "2023-06-01"
ANTHROPIC_BETA: Final = "managed-agents-2026-04-01"
