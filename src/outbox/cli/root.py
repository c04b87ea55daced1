"""What stands in front of every command of `outbox` and of `saga`: their common options."""

from importlib.metadata import version

import typer

from outbox.cli.logs import log_to_stderr
from outbox.cli.run import DatabaseUrl, Kafka, Options

_EPILOG = "Settings come from SAGABOX_* environment variables; see docs/operations.md, also for exit codes."


def command_line(package: str, about: str) -> typer.Typer:
    """An empty command line.

    Args:
        package: whose migrations `migrate` is about.
        about: what the command is for, in a sentence.
    """
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # its tracebacks show the values of variables, and some of them are secrets
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(help=about, epilog=_EPILOG)
    def options(
        context: typer.Context,
        *,
        database_url: DatabaseUrl = None,
        kafka: Kafka = None,
        show_version: bool = typer.Option(
            False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        assert not show_version, "the eager callback has left"
        log_to_stderr("critical")  # an error becomes the command's own message; what runs for long says what it logs
        context.obj = Options(database_url=database_url, kafka=kafka, package=package)

    return app


def _print_version(requested: bool) -> None:  # noqa: FBT001 - the shape typer calls
    if requested:
        print(f"sagabox {version('sagabox')}")
        raise typer.Exit
