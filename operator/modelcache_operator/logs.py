"""Structured logs: one JSON object a line, no secrets."""

import json
import logging
import sys
import time
from typing import Any


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON; what a caller gives as extra={"fields": …} becomes fields of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str) -> None:
    """Send all logs to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter()
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # one "Handler succeeded" for every event otherwise
    for noisy in ("kopf.objects", "kopf._core.reactor.running", "kopf.activities"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
