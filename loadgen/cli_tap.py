"""`fanmark tap`; cli.py takes it in."""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def tap(
    target: Annotated[str, typer.Option(help="URL of the server that agents use, .../v1.")],
    mcp: Annotated[
        list[str] | None,
        typer.Option(metavar="URL|/PATH=URL", help="An MCP server (streamable HTTP) to pass on to, at /mcp or /PATH."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the tap; 0 takes a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address of the tap; 0.0.0.0: all that this host has.")] = "127.0.0.1",
    duration: Annotated[float | None, typer.Option(min=0, metavar="S", help="End after so many seconds.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="End after so many queries.")] = None,
    idle: Annotated[
        float, typer.Option(min=0, metavar="S", help="A query ends when none of its calls is in flight for so long.")
    ] = 10.0,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with a key for the tap's own GETs; clients' keys pass.")
    ] = None,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Keep prompts and replies, word for word.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; runs/tap-TIME.")] = None,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0 takes a free one.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="Address of /metrics.")] = "127.0.0.1",
    json: Annotated[
        bool, typer.Option("--json", help="Print summary.json, and nothing else, on standard output.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> int:
    """Stands in front of a server and measures the agents that use it: pass its address as their base URL. Ctrl-C ends it."""
    from importlib.metadata import version

    import msgspec
    import uvloop

    from fanmark.loadgen import results
    from fanmark.loadgen.tap import session

    options = session.Options(
        target=target,
        out=out or Path("runs") / f"tap-{time.strftime('%Y%m%d-%H%M%S')}",
        version=version("fanmark"),
        command=sys.argv[1:],
        progress=None if quiet else sys.stderr,
        mcp=mcp or (),
        host=host,
        port=port,
        idle_s=idle,
        duration_s=duration,
        queries=queries,
        api_key_env=api_key_env,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
        metrics_hold_s=0.0 if os.environ.get("CI") else None,
        keep_text=keep_text,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(session.tap(options, lambda _: _go_behind())).summary
    if json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    else:
        results.print_result(found, options.out)
    return 1 if found["tap"]["untold"] else 0


def _go_behind() -> None:
    """What passes the bytes on is a process of its own, which is there by now: it goes before this one, that writes down what passed."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(5)
