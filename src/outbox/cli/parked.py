"""`outbox parked`: which keys are set aside, what waits behind them, and what is to become of it."""

import base64
import json
import math
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from outbox import limits, parking
from outbox.cli.exits import Exit, UsageProblem
from outbox.cli.run import AsJson, DatabaseUrl, connected, err, fail, out, print_json, run, settings_of
from outbox.cli.status import age
from outbox.cli.visible import from_visible, payload_lines, visible
from outbox.parking import ParkedEvent, ParkedKey
from outbox.postgres import Pool
from outbox.settings import Settings

app = typer.Typer(no_args_is_help=True, help="See the keys that cannot be published or applied, and decide about them.")

Parker = Annotated[
    str | None, typer.Option("--parker", metavar="NAME", help="Only by 'relay', or for this cache's table or inbox.")
]
Topic = Annotated[str | None, typer.Option("--topic", metavar="TOPIC", help="Only in this topic.")]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, max=10_000, help="At most so many.")]


@app.command("list", epilog="Example: `outbox parked list --parker relay --limit 10`")
def list_keys(
    context: typer.Context,
    *,
    parker: Parker = None,
    topic: Topic = None,
    limit: Limit = limits.PARKED_SHOWN,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List parked keys with the reason, by parker, topic and key."""
    run(_list(settings_of(context, database_url=database_url), parker, topic, limit, as_json=as_json))


async def _list(settings: Settings, parker: str | None, topic: str | None, limit: int, *, as_json: bool) -> None:
    async with connected(settings, application="outbox parked") as pool:
        found = await parking.keys(pool, parker=parker, topic=topic, limit=limit + 1)
    shown = found[:limit]
    if as_json:
        print_json({"keys": [asdict(key) for key in shown], "more": len(found) > limit})
        return
    if not shown:
        out.print("no key is parked")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("Parker", "Topic", "Key", "Reason"):
        table.add_column(heading, overflow="fold")
    for heading in ("Events", "For", "Retry"):
        table.add_column(heading, justify="right", no_wrap=True)
    now = datetime.now(UTC)
    for key in shown:
        texts = [Text(visible(text)) for text in (key.parker, key.topic, key.key, key.reason)]
        table.add_row(*texts, f"{key.events:,}", age((now - key.parked_at).total_seconds()), _retry_in(key, now))
    out.print(table)
    if len(found) > limit:
        out.print(f"there are more: raise --limit {limit}, or narrow with --parker and --topic", style="dim")


@app.command(epilog="Examples: `outbox parked show order-42`, `outbox parked show order-42 --json`")
def show(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key, as 'list' prints it.", show_default=False)],
    *,
    parker: Parker = None,
    topic: Topic = None,
    limit: Limit = limits.PARKED_SHOWN,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Show why a key is parked, and its waiting events in order; exits 1 when it is not parked."""
    run(_show(settings_of(context, database_url=database_url), key, parker, topic, limit, as_json=as_json))


async def _show(
    settings: Settings,
    key: str,
    parker: str | None,
    topic: str | None,
    limit: int,
    *,
    as_json: bool,
) -> None:
    async with connected(settings, application="outbox parked") as pool:
        places = await _find(pool, key, parker, topic)
        found = [(parked, await parking.events(pool, parked, limit=limit)) for parked in places]
    if as_json:
        print_json([{**asdict(parked), "waiting": [_as_json(e) for e in events]} for parked, events in found])
    for number, (parked, events) in enumerate([] if as_json else found):
        if number:
            out.print()
        _print_key(parked)
        for place, event in enumerate(events, start=1):
            _print_event(place, event)
        if parked.events > len(events):
            out.print(f"\n{parked.events - len(events):,} more: raise --limit {limit}", style="dim")
    if not found:
        _say_not_parked()


async def _find(pool: Pool, key: str, parker: str | None, topic: str | None) -> list[ParkedKey]:
    """Where the key is parked; it may be given as it was printed.

    Raises:
        UsageProblem: it is no text.
    """
    if not key.isascii() and "\\udc" in ascii(key):  # how Python passes on bytes of the command line
        raise UsageProblem("the key is not UTF-8, and no parked key is otherwise")
    places = await parking.find(pool, key, parker=parker, topic=topic)
    if not places and (pasted := from_visible(key)) != key:
        places = await parking.find(pool, pasted, parker=parker, topic=topic)
    return places


def _say_not_parked() -> NoReturn:
    err.print("this key is not parked: see outbox parked list")
    raise typer.Exit(Exit.PROBLEM)


def _retry_in(parked: ParkedKey, now: datetime) -> str:
    """When the key is tried again."""
    if parked.retry_at is None:
        return "on demand"
    seconds = (parked.retry_at - now).total_seconds()
    return f"in {age(seconds)}" if seconds > 0 else "now"


@app.command(epilog="Examples: `outbox parked retry order-42`, `outbox parked retry --all --reason TopicMissing`")
def retry(
    context: typer.Context,
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="The key, as 'list' prints it.", show_default=False)
    ] = None,
    *,
    parker: Parker = None,
    topic: Topic = None,
    every: Annotated[bool, typer.Option("--all", help="Every parked key, instead of one.")] = False,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="NAME", help="With --all: only those with this reason.")
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Have the waiting events of a key published or applied after all, in order; exits 1 when it is not parked.

    Mend the cause first. This only sets a flag: the relay, or the consumer of the key's partition, acts on it within
    about a second, and parks the key again if it fails.
    """
    settings = settings_of(context, database_url=database_url)
    if every == (key is not None):
        fail(UsageProblem("name a key, or give --all"))
    if key is None:
        run(_retry_all(settings, parker, topic, reason, as_json=as_json))
    elif reason is not None:
        fail(UsageProblem("--reason goes with --all"))
    else:
        run(_retry(settings, key, parker, topic, as_json=as_json))


async def _retry(settings: Settings, key: str, parker: str | None, topic: str | None, *, as_json: bool) -> None:
    async with connected(settings, application="outbox parked") as pool:
        places = await _find(pool, key, parker, topic)
        flagged = await parking.retry(pool, places)
    if as_json:
        print_json({"retried": flagged, "keys": [_place(place, place.events) for place in places]})
    for place in [] if as_json or not flagged else places:
        _print_place(place, "are tried again" if place.events != 1 else "is tried again")
    if not flagged:
        _say_not_parked()


async def _retry_all(
    settings: Settings, parker: str | None, topic: str | None, reason: str | None, *, as_json: bool
) -> None:
    async with connected(settings, application="outbox parked") as pool:
        flagged = await parking.retry_all(pool, parker=parker, topic=topic, reason=reason)
    if as_json:
        print_json({"retried": flagged})
    else:
        out.print(f"{flagged:,} parked {'key is' if flagged == 1 else 'keys are'} tried again")


@app.command(epilog="Examples: `outbox parked discard order-42`, `outbox parked discard order-42 --parker relay --yes`")
def discard(
    context: typer.Context,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key, as 'list' prints it.", show_default=False)],
    *,
    parker: Parker = None,
    topic: Topic = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Give up the waiting events of a key **for ever** and free it; exits 1 when it is not parked.

    The relay then publishes, and a consumer applies, what comes later, as if the discarded events had never been. See
    them first: `outbox parked show KEY`.
    """
    run(_discard(settings_of(context, database_url=database_url), key, parker, topic, yes=yes, as_json=as_json))


async def _discard(
    settings: Settings, key: str, parker: str | None, topic: str | None, *, yes: bool, as_json: bool
) -> None:
    async with connected(settings, application="outbox parked") as pool:
        places = await _find(pool, key, parker, topic)
        if places and not yes:
            for place in places:
                _print_place(place, "would be lost")
            _confirm()
        counts = [await parking.discard(pool, place) for place in places]
    gone = [(place, count) for place, count in zip(places, counts, strict=True) if count is not None]
    if as_json:
        print_json({"discarded": [_place(place, count) for place, count in gone]})
    for place, count in [] if as_json else gone:
        _print_place(replace(place, events=count), "discarded")
    if not gone:
        _say_not_parked()


def _confirm() -> None:
    if not out.is_terminal:
        raise UsageProblem("cannot ask without a terminal; nothing was done, repeat with --yes to go ahead")
    if not typer.confirm("Go ahead?"):
        out.print("nothing was done")
        raise typer.Exit(Exit.USAGE)


def _place(place: ParkedKey, events: int) -> dict[str, object]:
    return {"parker": place.parker, "topic": place.topic, "key": place.key, "events": events}


def _print_place(place: ParkedKey, fate: str) -> None:
    events = f"{place.events:,} {'event' if place.events == 1 else 'events'}"
    text = f" in {visible(place.topic)}, parked by {visible(place.parker)}: {events} {fate}"
    out.print(Text.assemble((visible(place.key), "bold"), text), soft_wrap=True)


def _print_key(parked: ParkedKey) -> None:
    origin = f"shard {parked.shard}" if parked.partition is None else f"partition {parked.partition}"
    waiting = f"{parked.events:,} {'event' if parked.events == 1 else 'events'} waiting"
    out.print(Text.assemble((visible(parked.key), "bold"), f"  in {visible(parked.topic)}, {origin}, {waiting}"))
    out.print(Text(f"parked by {visible(parked.parker)} since {parked.parked_at:%Y-%m-%d %H:%M:%S} UTC"))
    out.print(Text.assemble((visible(parked.reason), "red"), f": {visible(parked.detail)}"))
    failed = f"; {parked.attempts:,} {'retry has' if parked.attempts == 1 else 'retries have'} failed"
    out.print(Text(f"tried again: {_retry_in(parked, datetime.now(UTC))}{failed if parked.attempts else ''}"))


def _print_event(place: int, event: ParkedEvent) -> None:
    kind = "unknown type" if event.event_type is None else f"{event.event_type} v{event.schema_version or 1}"
    facts = [event.event_id or "no id", *_origin(event)]
    if event.payload_bytes is not None:
        facts.append(f"{event.payload_bytes:,} bytes")
    lines = ["(no payload)"] if event.payload is None else payload_lines(event.payload, is_whole=event.is_whole)
    if not event.is_whole:
        lines.append("... (the rest is not shown)")
    out.print()
    out.print(Text.assemble((f"{place}. {visible(kind)}", "bold"), f"  {event.created_at:%Y-%m-%d %H:%M:%S} UTC"))
    out.print(_indented(visible(", ".join(facts)), style="dim"), soft_wrap=True)
    if event.headers is not None:
        out.print(_indented(f"headers {visible(event.headers)}", style="dim"), soft_wrap=True)
    for line in lines:
        out.print(_indented(line), soft_wrap=True)


def _indented(line: str, style: str = "") -> Text:
    """A line that the terminal wraps, so that it can be copied whole."""
    return Text(f"   {line}", style=style)


def _origin(event: ParkedEvent) -> list[str]:
    facts = (
        ("position", event.position),
        ("window", event.window_no),
        ("partition", event.partition),
        ("offset", event.offset),
    )
    return [f"{name} {value}" for name, value in facts if value is not None]


def _as_json(event: ParkedEvent) -> dict[str, Any]:
    """The payload as JSON where it is JSON that every reader takes, else as base64."""
    fields = asdict(event)
    payload = fields.pop("payload")
    headers = fields.pop("headers")
    fields["headers"] = None if headers is None else json.loads(headers)
    if payload is None:
        return {**fields, "payload": None}
    if event.is_whole:
        try:
            return {**fields, "payload": json.loads(payload, parse_float=_finite, parse_constant=_finite)}
        except (ValueError, RecursionError):
            pass  # not JSON for every reader: as base64 below
    return {**fields, "payload_base64": base64.b64encode(payload).decode()}


def _finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError(f"{literal} is not a number for every reader of JSON")
    return value
