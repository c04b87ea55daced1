"""`outbox cache explain`: why a row is what it is, on one screen."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from outbox import limits
from outbox.cache.explain import Explanation, Origin, PageSeen, Scanned, Wanted, explain
from outbox.cache.http import HttpOwner
from outbox.cache.table import SYNCED
from outbox.cache.verdicts import Judged, Verdict
from outbox.cli.exits import Exit
from outbox.cli.loading import cache_of
from outbox.cli.run import AsJson, DatabaseUrl, Kafka, connected, out, print_json, run, settings_of
from outbox.cli.status import age
from outbox.cli.visible import from_visible, visible
from outbox.settings import Settings
from outbox.upkeep import migrate

_SHOWN: Final = 20
_STYLES: Final = {
    Verdict.APPLIED_LAST: "bold green",
    Verdict.PARKED: "bold red",
    Verdict.NOT_READ: "yellow",
    Verdict.NO_TRACE: "bold red",
}


def explain_key(  # noqa: PLR0913 - each is an argument or option of the command
    context: typer.Context,
    table: Annotated[str, typer.Argument(metavar="TABLE", help="As the cache is declared.", show_default=False)],
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key of the row.", show_default=False)],
    *,
    app_name: Annotated[
        str | None,
        typer.Option(
            "--app", metavar="MODULE[:NAME]", help="Where the cache is declared: tells event types and the owner."
        ),
    ] = None,
    newest: Annotated[
        int,
        typer.Option("--newest", metavar="N", min=0, max=10_000_000, help="Records of the partition that are read."),
    ] = limits.EXPLAIN_RECORDS,
    partition: Annotated[
        int | None, typer.Option("--partition", metavar="N", min=0, help="Where the key's records are.")
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
    kafka: Kafka = None,
) -> None:
    """Tell which event or page made a row what it is, what was skipped and why, and what waits.

    Exits 1 when nothing is known of the key anywhere.
    """
    settings = settings_of(context, database_url=database_url, kafka=kafka)
    wanted = Wanted(servers=settings.kafka if newest else None, records=newest, partition=partition)
    run(_explain(settings, table, key, app_name, wanted=wanted, as_json=as_json))


async def _explain(
    settings: Settings, table: str, key: str, app_name: str | None, *, wanted: Wanted, as_json: bool
) -> None:
    async with connected(settings, application="outbox cache explain") as pool:
        await migrate.check(pool)
        cache = None if app_name is None else await cache_of(app_name, table)
        found = await explain(pool, table, from_visible(key), replace(wanted, cache=cache))
        if cache is not None and isinstance(cache.owner, HttpOwner):
            await cache.owner.close()
    if as_json:
        print_json({**asdict(found), "known": found.is_known})
    else:
        _print(found)
    if not found.is_known:
        raise typer.Exit(Exit.PROBLEM)


def _print(found: Explanation) -> None:
    out.print(
        Text.assemble((visible(found.key), "bold"), f"  in {visible(found.table)}, fed from {visible(found.topic)}")
    )
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, line in _lines(found):
        facts.add_row(label, line)
    if found.scanned is not None:
        facts.add_row("records", _span(found.scanned))
    out.print(facts)
    if found.scanned is not None and found.scanned.records:
        _print_records(found.scanned)
    if not found.is_known:
        out.print(Text("nothing is known of this key", style="bold red"))


def _lines(found: Explanation) -> Iterator[tuple[str, Text]]:
    pages = {page.id: page for page in found.pages}
    if found.row is not None:
        assert found.row_origin is not None
        columns = {
            name: value for name, value in found.row.items() if not name.startswith("outbox_") and name != SYNCED
        }
        yield "row", Text(visible(json.dumps(columns, ensure_ascii=False)))
        yield from _origin(found.row_origin, pages, "made by")
    elif found.tombstone is not None:
        yield "row", Text("none, it was deleted", style="yellow")
        yield from _origin(found.tombstone, pages, "deleted by")
    elif found.pages:
        yield "row", Text(f"none: {_page(found.pages[0])} speaks for the key and does not have it", style="yellow")
    else:
        yield "row", Text("none, and nothing says that there was one", style="yellow")
    for parked in found.parked:
        events = f"{parked.events:,} {'event' if parked.events == 1 else 'events'}"
        since = f"{parked.parked_at:%Y-%m-%d %H:%M:%S} UTC"
        why = f"{visible(parked.reason)}: {visible(parked.detail)}"
        yield "parked", Text(f"{events} since {since} by {visible(parked.parker)}: {why}", style="red")
    if found.parked_at_owner:
        yield "parked", Text("the owner's relay has parked the key: ask there, outbox parked show", style="red")
    lag = (
        "not known: no watermark of the owner's relay was applied"
        if found.lag_seconds is None
        else age(found.lag_seconds)
    )
    yield "behind", Text(lag)
    if found.owner is not None:
        yield "owner", _owner(found)


def _origin(origin: Origin, pages: dict[int, PageSeen], label: str) -> Iterator[tuple[str, Text]]:
    at = f"  {origin.at:%Y-%m-%d %H:%M:%S} UTC"
    event = _event(origin)
    if origin.page_id is not None and origin.by_page:
        page = pages.get(origin.page_id)
        yield label, Text((_page(page) if page else f"page {origin.page_id} of the owner") + at)
        if event:
            yield "before", Text(event)
        return
    yield label, Text((event or "an event of a producer without positions") + at)


def _event(origin: Origin) -> str:
    facts = (
        ("partition", origin.partition),
        ("offset", origin.offset),
        ("log", origin.log_id if origin.position is not None else None),
        ("position", origin.position),
        ("transaction", origin.transaction_id),
    )
    known = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
    return f"the event at {known}" if known else ""


def _page(page: PageSeen) -> str:
    merged = f"{page.merged_at:%Y-%m-%d %H:%M:%S} UTC"
    return f"page {page.id} of the owner (log {page.log_id}, snapshot {page.snapshot}, merged {merged})"


def _owner(found: Explanation) -> Text:
    owner = found.owner
    assert owner is not None
    if owner.error is not None:
        return Text(f"does not answer: {visible(owner.error)}", style="red")
    if owner.row is None:
        return Text("has no such row", style="red" if found.row is not None else "")
    if owner.differs is None:
        return Text.assemble(("has a row: ", "red"), visible(json.dumps(owner.row, ensure_ascii=False)))
    if owner.differs:
        shown = visible(json.dumps({name: owner.row.get(name) for name in owner.differs}, ensure_ascii=False))
        return Text(f"differs: {shown}", style="red")
    return Text("has the same row")


def _span(scanned: Scanned) -> Text:
    if scanned.why_not is not None:
        return Text(f"not read: {visible(scanned.why_not)}", style="yellow")
    stands = "never read" if scanned.next_offset is None else f"the consumer stands at {scanned.next_offset:,}"
    state = "" if scanned.state in {None, "running"} else f", where it does not go on: {scanned.state}"
    none = "" if scanned.records else ". None of this key: more with --newest, elsewhere with --partition"
    span = f"partition {scanned.partition}, offsets from {scanned.first:,} to before {scanned.end:,}"
    return Text(f"{span}; {stands}{state}{none}")


def _print_records(scanned: Scanned) -> None:
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("Offset", justify="right", no_wrap=True)
    shown.add_column("Event", overflow="fold")
    shown.add_column("At (UTC)", no_wrap=True)
    shown.add_column("What became of it", overflow="fold")
    for record in scanned.records[-_SHOWN:]:
        shown.add_row(
            f"{record.offset:,}",
            Text(visible(record.event_type or "no type")),
            f"{record.at:%m-%d %H:%M:%S}",
            Text(_became(record), style=_STYLES.get(record.verdict, "")),
        )
    out.print(shown)
    if len(scanned.records) > _SHOWN:
        out.print(f"and {len(scanned.records) - _SHOWN:,} before them: --json has all", style="dim")


def _became(record: Judged) -> str:
    texts = {
        Verdict.NOT_READ: "not read yet",
        Verdict.REPLAYED: "dropped: replayed on purpose, and the cache does not take that",
        Verdict.DUPLICATE: "dropped: "
        + ("came before" if record.because is None else f"the same as offset {record.because:,}"),
        Verdict.UNKNOWN_TYPE: "skipped: the cache has no handler for this type",
        Verdict.PARKED: "parked",
        Verdict.SEEN_BY_PAGE: f"part of page {record.because}",
        Verdict.OLDER_LOG: "skipped: of an older log than the row",
        Verdict.APPLIED_LAST: "applied last",
        Verdict.SUPERSEDED: f"superseded by offset {record.because}",
        Verdict.NO_TRACE: "applied or skipped, and nothing of it is left",
    }
    return texts[record.verdict]
