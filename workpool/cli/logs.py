"""The only place that configures logging: lines on stderr, text or JSON.

`workpool.logs` says what stands in a line.
"""

import logging
import sys
from types import TracebackType

from workpool.logs import JsonFormatter, TextFormatter

log = logging.getLogger("workpool")


def configure(level: str, form: str) -> None:
    """Log to stderr from `level` on, as `text` or `json`; uncaught errors and warnings, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("crashed error=%s", kind.__name__, exc_info=(kind, error, trace))
