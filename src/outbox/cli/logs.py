"""Log lines as key=value pairs on standard error, one a line, whatever the message holds."""

import logging
import sys
from datetime import UTC, datetime
from typing import Final

from outbox.cli.visible import visible
from outbox.errors import OutboxError

_QUIET: Final = ("aiokafka", "asyncio", "faststream")
"""Libraries that report at info what is our business to report."""


class KeyValue(logging.Formatter):
    """`at=... level=... logger=... message="..."`, with `error=...` and a traceback only for what was not foreseen."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on lines of its own."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = (
            f"at={at.replace('+00:00', 'Z')} level={record.levelname.lower()} logger={record.name}"
            f" message={_quoted(record.getMessage())}"
        )
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return line
        line += f" error={type(error).__name__}"
        if isinstance(error, OutboxError):
            return line  # its text says what to do
        return f"{line}\n{self.formatException((type(error), error, error.__traceback__))}"


def _quoted(text: str) -> str:
    return '"' + visible(text).replace('"', "'") + '"'


def log_to_stderr(level: str) -> None:
    """Set logging up for a process that is ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValue())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
