"""Make a page about runs, or show it while they go on.

python -m zero_sft.report runs/a runs/b --out report.html
"""

import html
import http.server
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_sft.errors import ArgumentError, ExportError
from zero_sft.options.command import Command
from zero_sft.options.spec import specs_of
from zero_sft.printable import printable

if TYPE_CHECKING:
    from zero_sft.report.runs import Run

REFRESH_SECONDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportArguments:
    """Options of the report."""

    runs: list[str] | None = field(default=None, metadata={"help": "The --output_dir of each run."})
    out: str = field(default="report.html", metadata={"help": "The page; it needs no other file."})
    watch: bool = field(
        default=False, metadata={"help": "Serve the page on this machine alone, made for each request, instead of writing it."}
    )
    port: int = field(default=8765, metadata={"help": "The port for --watch."})


def command() -> Command:
    """Return the command and its options."""
    return Command(
        program="python -m zero_sft.report RUN [RUN ...]",
        description="Make a page about runs: losses, rates, time, load, answers, arguments; several runs side by side.",
        groups={"Options": list(specs_of(ReportArguments).values())},
        required={"runs": "the --output_dir of a run"},
        positive=("port",),
        largest={"port": 65535},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    runs = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    return command().run([*(["--runs", *runs] if runs else []), *words[len(runs) :]], _report)


def _report(options: Any, _notes: Sequence[str]) -> None:
    from zero_sft.report.page import page

    folders = [Path(run).expanduser() for run in options.runs]
    text = page(_runs(folders))
    if options.watch:
        _serve(folders, options.port)
        return
    out = Path(options.out).expanduser()
    try:
        out.write_text(text, encoding="utf-8", errors="replace")  # a name may hold half of a surrogate pair
    except OSError as error:
        raise ExportError(
            f"{out} can't be written: {error.strerror or error}. Name another --out.", code="export.unwritable"
        ) from error
    sys.stdout.write(printable(f"written: {out}") + "\n")


def _runs(folders: Sequence[Path]) -> "list[Run]":
    """Read the runs; one without logs is passed over with a line, if there are others.

    Raises:
        ArgumentError: none has logs.
    """
    from zero_sft.report.runs import read_run

    found, problems = [], []
    for folder in folders:
        try:
            found.append(read_run(folder))
        except ArgumentError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    for problem in problems:
        sys.stderr.write(printable(f"left out: {problem}") + "\n")
    return found


def _serve(folders: Sequence[Path], port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ExportError: the port is taken.
    """
    from zero_sft.report.page import page

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                text, status = page(_runs(folders), refresh_seconds=REFRESH_SECONDS), 200
            except ArgumentError as error:  # the logs were removed meanwhile
                text, status = f"<!doctype html><meta charset=utf-8><p>{html.escape(str(error))}", 503
            content = text.encode(errors="replace")
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Write no line for each request."""

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ExportError(
            f"port {port} can't be used: {error.strerror or error}. Give another --port.", code="export.port_taken"
        ) from error
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}/ shows the runs, until Ctrl-C\n")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
