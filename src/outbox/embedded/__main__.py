"""`python -m outbox.embedded`: both servers, until Ctrl-C or SIGTERM."""

import signal
import sys
import threading

from outbox import embedded

_LOOK_SECONDS = 0.5


def main() -> int:
    """Start both servers, print their addresses, and wait; the status is 1 if one of them ends by itself."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    with embedded.stack() as stack:
        print(f"{embedded.DATABASE_URL}={stack.database_url()}")
        print(f"{embedded.KAFKA_BOOTSTRAP_SERVERS}={stack.kafka}", flush=True)
        never = threading.Event()
        while stack.running:
            never.wait(_LOOK_SECONDS)
        print("a server ended by itself; both are stopped now", file=sys.stderr)
    return 1


def _leave(_number: int, _frame: object) -> None:
    # A second signal must not interrupt the cleaning up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
