"""A page of documentation as one session: its fenced blocks run from top to bottom.

What a block is follows from its language:

    python    runs in the page's namespace, where `pool` and `workflow_pool` are open and `kafka` is known; may await
    sql       is executed in llm_agent_db
    console   a line after `$` is a command, run in the repository; the lines under it must appear in its output in that
              order, and `...` in them stands for anything
    text      nobody types it; also json, ini and yaml

An HTML comment in front of a block says more where that is not enough:

    <!-- test: program -->      python: a whole program, run as a process that finds no servers in its environment
    <!-- test: workflow_db -->  sql: for the other database
    <!-- test: service -->      console: the page goes on when the command has printed the lines under it; it runs on
                                beside what follows, until SIGTERM, which must end it with status 0
    <!-- test: help -->         console: the command is not run, but `--help` after it shows that it would be understood
    <!-- test: dry -->          console: make is only asked what it would do

A block without a language is not run, and must not look like a command.
"""

import ast
import asyncio
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from outbox import Pool
from outbox.embedded.databases import wheel_bin_dir

ROOT: Final = Path(__file__).parents[2]
SILENT: Final = frozenset({"", "text", "json", "ini", "yaml"})
COMMANDS: Final = re.compile(r"^(\$ |outbox |saga |make |pip |python |psql )", re.MULTILINE)
STOP_TIMEOUT_SECONDS: Final = 20.0
SERVERS: Final = frozenset({"DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"})

_BLOCK: Final = re.compile(
    r"^(?:<!-- test: (?P<test>[\w ]+) -->\n+)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    line: int
    language: str
    test: str | None
    body: str

    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command of a console block with the output shown under it."""
        for part in re.split(r"^\$ ", self.body, flags=re.MULTILINE)[1:]:
            command, _, output = part.replace("\\\n", "").partition("\n")
            yield command.partition("  #")[0].strip(), output


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start("body")) + 1, match["language"], match["test"], match["body"])
        for match in _BLOCK.finditer(text)
    ]


def shows(output: str, expected: str) -> bool:
    """Whether the expected lines appear in the output in their order."""
    lines = [re.escape(line.strip()).replace(r"\.\.\.", ".*") for line in expected.splitlines() if line.strip()]
    return re.search(r"(?s:.*)".join(lines), output) is not None


class Session:
    """Runs the blocks of one page."""

    def __init__(
        self, page: Path, urls: Mapping[str, str], pools: Mapping[str, Pool], kafka: str, folder: Path
    ) -> None:
        """`urls` and `pools` name llm_agent_db and workflow_db; programs are written to `folder`."""
        self._page = page
        self._pools = pools
        self._program_file = folder / "program.py"
        self._environment = {
            **os.environ,
            "DATABASE_URL": urls["llm_agent_db"],
            "KAFKA_BOOTSTRAP_SERVERS": kafka,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(wheel_bin_dir() or "")]),
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
            "COLUMNS": "120",
        }
        self._services: list[Command] = []
        self._names: dict[str, Any] = {
            "__name__": page.stem,
            "pool": pools["llm_agent_db"],
            "workflow_pool": pools["workflow_db"],
            "kafka": kafka,
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        while self._services:
            await self._services.pop().end()

    async def run(self, block: Block) -> None:
        """Run one block.

        Raises:
            AssertionError: it did not do what the page says.
        """
        match block.language, block.test:
            case "python", None:
                await self._python(block)
            case "python", "program":
                self._program_file.write_text(block.body, encoding="utf-8")
                own = {name: value for name, value in self._environment.items() if name not in SERVERS}
                await Command([sys.executable, str(self._program_file)], own).ends_well("")
            case "sql", database:
                await self._pools[database or "llm_agent_db"].execute(block.body)
            case "console", test:
                for line, expected in block.commands():
                    await self._console(line, expected, test)
            case language, _:
                assert language in SILENT, f"a block of {language!r} cannot be tested; is it text?"
                assert not COMMANDS.search(block.body), "somebody may type this: fence it as console"

    async def _console(self, line: str, expected: str, test: str | None) -> None:
        asked = {"dry": "--dry-run", "help": "--help"}.get(test or "", "")
        command = Command(["bash", "-c", f"exec {line} {asked}"], self._environment)
        if test == "service":
            await command.shows(expected)
            self._services.append(command)
        else:
            await command.ends_well(expected)

    async def _python(self, block: Block) -> None:
        aligned = "\n" * (block.line - 1) + block.body  # tracebacks then name the page's lines
        code = compile(aligned, str(self._page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        result = eval(code, self._names)  # noqa: S307 - our own pages
        if inspect.isawaitable(result):
            await result


class Command:
    """One process and what it has printed."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """It starts when it is first waited for."""
        self._arguments = arguments
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._output = ""

    async def ends_well(self, expected: str) -> None:
        """Wait for its end; the status is 0 and the expected lines were printed."""
        try:
            await self._read(until=None)
        except BaseException:
            await self._kill()
            raise
        assert self._process is not None
        status = await self._process.wait()
        assert status == 0, f"{self._arguments[-1]} ended with {status}:\n{self._output}"
        self._compare(expected)

    async def shows(self, expected: str) -> None:
        """Wait until it has printed the expected lines."""
        try:
            await self._read(until=expected)
            self._compare(expected)
        except BaseException:
            await self._kill()
            raise

    async def end(self) -> None:
        """SIGTERM, after which it ends well."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT_SECONDS):
            await self.ends_well("")

    async def _read(self, *, until: str | None) -> None:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments, env=self._environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._output += line.decode()
            if until is not None and shows(self._output, until):
                return

    async def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _compare(self, expected: str) -> None:
        assert shows(self._output, expected), f"{self._arguments[-1]} printed\n{self._output}\nnot\n{expected}"
