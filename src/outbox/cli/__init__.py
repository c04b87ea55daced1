"""The `outbox` command. `main` runs it; see `exits` for what its exit codes mean.

Other distributions add commands through the entry point group `outbox.cli`: each entry names a `typer.Typer`, which
becomes the group of commands of the entry's name.
"""

from outbox.cli.app import main

__all__ = ["main"]
