"""Logging set-up: plain lines or JSON, and from which level."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, Final, TextIO


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and `extra` fields."""

    _STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        body: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        body |= {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def configure_logging(stream: TextIO | None = None) -> None:
    """Send the `serving` loggers to `stream`, by default stderr.

    SERVING_LOG chooses plain (default) or json, SERVING_LOG_LEVEL the level (default info).

    Other libraries' loggers are left as they are. Calling it again replaces the handler.
    """
    # Not sys.stderr: in a replica, Serve has put a logger of its own there, which drops ours.
    handler = logging.StreamHandler(stream or sys.__stderr__ or sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    as_json = os.environ.get("SERVING_LOG", "plain") == "json"
    handler.setFormatter(JsonFormatter() if as_json else plain)
    logger = logging.getLogger("serving")
    logger.handlers = [handler]
    logger.propagate = False
    level = os.environ.get("SERVING_LOG_LEVEL", "info").upper()
    logger.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
