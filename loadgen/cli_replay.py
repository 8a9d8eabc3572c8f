"""The commands around recordings: import, export. Part of the command line, apart for its size."""

from pathlib import Path
from typing import Annotated

import typer

from fanmark.loadgen.errors import ScenarioError


def import_(
    format: Annotated[str, typer.Argument(help="mooncake, weka, aiperf-dag or otel.")],
    path: Annotated[Path, typer.Argument(help="The trace: a file (*.jsonl, *.json, also *.gz), or a folder of them.")],
    out: Annotated[Path, typer.Option(help="The folder to write: a recording, for an arm with topology = replay.")],
) -> None:
    """Reads a public trace and writes it as a recording (docs/replay.md)."""
    from fanmark.loadgen.imports import import_trace

    found = import_trace(format, path, out)
    print(f"{out}: {found.queries:,} queries, {found.calls:,} calls and tool calls")
    for note in found.notes:
        print(f"note     {note}")


def export(
    format: Annotated[str, typer.Argument(help="aiperf-dag.")],
    folder: Annotated[Path, typer.Argument(help="A recording.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    arm: Annotated[str, typer.Option(help="Of a recording with several arms, one of them.")] = "",
) -> None:
    """Writes a recording in another tool's form (docs/replay.md)."""
    from fanmark.loadgen.export_dag import export as written
    from fanmark.loadgen.recording import Recording

    if format != "aiperf-dag":
        raise ScenarioError(f"export {format}: there is no such format, but aiperf-dag")
    found = written(Recording(folder, arm), out)
    print(
        f"{out}: {found.queries:,} queries, {found.conversations:,} of them conversations, the others rounds of calls"
    )
