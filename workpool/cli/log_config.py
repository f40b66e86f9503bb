"""The configuration of logging: lines on stderr, as text or JSON.

`workpool.logs` has the format of a line.
"""

import logging
import sys
from types import TracebackType

from workpool.logs import JsonFormatter, TextFormatter

log = logging.getLogger("workpool")


def configure(level: str, form: str) -> None:
    """Log to stderr from `level` on, as `text` or `json`, with uncaught errors and warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("crashed error=%s", kind.__name__, exc_info=(kind, error, trace))
