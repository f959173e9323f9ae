"""Log lines that machines can read: JSON, or key=value for people."""

import json
import logging
import sys
import time
from typing import Any, Literal

LogFormat = Literal["json", "text"]


class _Formatter(logging.Formatter):
    def __init__(self, kind: LogFormat) -> None:
        super().__init__()
        self._json = kind == "json"

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows it in text, and is a field in JSON."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields: dict[str, Any] = {
            "time": moment,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(fields, ensure_ascii=False, default=str)
        exception = fields.pop("exception", "")
        message = " ".join(str(fields.pop(key)) for key in ("time", "level", "message"))
        pairs = "".join(f" {key}={value}" for key, value in fields.items() if key != "logger" and value != "")
        return f"{message}{pairs}" + (f"\n{exception}" if exception else "")


def configure(level: str, kind: LogFormat) -> None:
    """Write all logs to standard error.

    Args:
        level: such as "info".
        kind: "json" or "text".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(kind))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
