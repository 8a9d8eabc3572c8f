"""What several commands do alike."""

import argparse
import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from fanmark.loadgen.errors import FanmarkError

SimulatorsOpt = Annotated[
    str | None,
    typer.Option(metavar="N|auto", help="Processes that share the simulations out; auto: one per core less one."),
]
ProcessorsOpt = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS|auto", help="Share them out over this Ray cluster's processors, or --workers N."),
]


def checked_scenario(raw: dict[str, Any], source: str, settings: list[str]) -> tuple[Any, Any]:
    """The scenario, and the topologies that it may name."""
    from fanmark.agents import topologies
    from fanmark.loadgen import scenario_check
    from fanmark.loadgen.recording import keep_enacted
    from fanmark.loadgen.user_topology import with_users

    scenario_check.override(raw, settings)
    if raw.pop("tapped", False):  # what a tap has recorded is re-enacted: a run like any other
        keep_enacted(raw, source)
    table = with_users(raw, source, topologies())
    return scenario_check.check(raw, source, table), table


def workers_of(wanted: str) -> int:
    """How many processes --workers asks for."""
    if wanted == "auto":
        return max(1, len(os.sched_getaffinity(0)) - 1)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise FanmarkError(f"--workers {wanted}: must be a number of processes, 1 or more, or auto")
    return int(wanted)


def shared_out(workers: str | None, ray: str | None, on_loss: str, journals: str) -> dict[str, Any]:
    """What of a run's options says who carries it out; of a cluster, 0 workers are one for each node."""
    for flag, given, allowed in (
        ("--on-worker-loss", on_loss, ("continue", "stop")),
        ("--journals", journals, ("collect", "keep")),
    ):
        if given not in allowed:
            raise FanmarkError(f"{flag} {given}: must be {' or '.join(allowed)}")
    one_a_node = ray is not None and workers in (None, "auto")
    count = 0 if one_a_node else workers_of(workers or "1")
    return {"workers": count, "ray": ray, "stop_on_loss": on_loss == "stop", "keep_journals": journals == "keep"}


@contextmanager
def simulators(workers: str | None, ray: str | None) -> Iterator[Any]:
    """Those that simulations are shared out over; None: this process does them all. Nothing is started before it is needed."""
    auto = ray is not None and workers in (None, "auto")
    count = None if auto else workers_of(workers or "1")
    if ray is None and count == 1:
        yield None
        return
    from fanmark.loadgen.shared_out import shared_by

    with shared_by(count, ray, version()) as shared:
        yield shared


def split_flag(argv: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """A flag's value, and the other arguments."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument(flag, dest="value")
    try:
        found, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise FanmarkError(str(e)) from None
    return found.value, others


def served_on_ray(kind: str, address: str, flags: Sequence[str]) -> int:
    """Our stubs or tool servers on a Ray cluster, until a signal."""
    from fanmark.loadgen.ray_fleet import serve
    from fanmark.servers import router, stub, tool_router, tools

    kinds: dict[str, Any] = {
        "stub": (router.serve, stub.parse_options, stub.StubError),
        "tools": (tool_router.serve, tools.parse_options, tools.ToolsError),
    }
    routing, parse_options, error = kinds[kind]
    try:
        options = parse_options(flags)
        run_async(serve(address, version(), lambda start: routing(options, flags, start)))
    except error as e:
        raise FanmarkError(f"serve {kind}: {e}") from None
    return 0


def run_async(coroutine: Any) -> Any:
    """Carries it out on an event loop of its own."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def json_text(value: Any) -> str:
    """As all commands print it."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=1).decode()


def version() -> str:
    """This version of fanmark."""
    import importlib.metadata

    return importlib.metadata.version("fanmark")
