"""The configuration of logging: lines on stderr, as text or JSON.

`workpool.logs` formats each line.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from types import TracebackType

from workpool.log_fields import PoolIds
from workpool.logs import JsonFormatter, TextFormatter

log = logging.getLogger("workpool")


def configure_logging(level: str, form: str, ids: Callable[[], Mapping[str, str]] = dict) -> None:
    """Log to stderr as `text` or `json`, including uncaught exceptions and warnings.

    `ids` returns the ids of the process's only pool, for the records of all loggers.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(PoolIds(ids))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught_exception


def _log_uncaught_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("crashed", exc_info=(kind, error, trace))
