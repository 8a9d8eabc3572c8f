"""The commands on runs that have ended; cli.py takes them in."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or simulations.")],
    form: Annotated[str, typer.Option("--format", help="html, or md (Markdown, without the pictures).")] = "html",
    out: Annotated[
        Path | None,
        typer.Option(help="File of the report; for one run's HTML RUN/report.html, for Markdown the terminal."),
    ] = None,
) -> None:
    """Makes a report of one run, or of several below each other, from their files alone."""
    from fanmark.loadgen.errors import ScenarioError
    from fanmark.loadgen.report.write import NAME, render, write

    if form not in ("html", "md"):
        raise ScenarioError(f"--format {form}: must be html or md")
    if out is None and form == "html":
        if len(runs) > 1:
            raise ScenarioError(f"--out: {len(runs)} runs in one page need the name of a file")
        out = runs[0] / NAME
    text = render(runs, form)
    if out is None:
        print(text, end="")
    else:
        write(out, text)
        print(f"report   {out}")


def verify(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or simulations.")],
) -> int:
    """Recomputes every figure of the summaries from the runs' other files, and tells what differs (exit 1)."""
    from fanmark.agents import topologies
    from fanmark.loadgen import verify as check

    differ = 0
    for folder in runs:
        found = check.verify(folder, topologies())
        differ += len(found.differ)
        print("\n".join(check.lines(folder, found)))
    return int(differ > 0)
