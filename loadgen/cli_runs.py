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


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="The first, and those held against it.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="FIGURE > +N%", help="Exit 5 where the whole interval of a change is beyond this."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Compare runs of differing scenarios.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="What --fail-if found, as JUnit XML.")] = None,
) -> int:
    """Holds the same arms of runs side by side: each resource's ratio with its interval, and a plain verdict."""
    import msgspec

    from fanmark.agents import topologies
    from fanmark.loadgen import compare as comparing
    from fanmark.loadgen import junit as xml
    from fanmark.loadgen.errors import ScenarioError

    if len(runs) < 2:
        raise ScenarioError(f"compare {runs[0]}: give two runs or more")
    first, *others = (comparing.read(folder, topologies()) for folder in runs)
    gates = [comparing.gate_of(text, list(first.arms)) for text in fail_if or []]
    found = [comparing.compare(first, other, force=force) for other in others]
    cases = [comparing.judge(gate, each) for each in found for gate in gates]
    if json:
        told = {"schema": comparing.SCHEMA, "comparisons": found, "gates": [vars(case) for case in cases]}
        print(msgspec.json.format(msgspec.json.encode(told), indent=1).decode())
    else:
        print("\n\n".join("\n".join(comparing.lines(each)) for each in found))
        for case in cases:
            print(f"{case.outcome.ljust(8)} {case.name}: {case.said}")
    if junit is not None:
        xml.write(junit, "fanmark compare", cases)
    return 5 if any(case.outcome == "failed" for case in cases) else 0
