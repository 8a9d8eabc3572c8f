"""Public traces as recordings (recording.py): the explicit table of their readers, each of which gives query after query."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import msgspec

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.imports.trace import Trace
from fanmark.loadgen.recording import Recorder

_FILES = {"mooncake": "mooncake", "weka": "weka", "aiperf-dag": "aiperf_dag", "otel": "otel"}


def formats() -> Mapping[str, str]:
    """What can be read: the formats' names, each with its reader's first line."""
    return {name: (import_module(f"{__name__}.{file}").__doc__ or "").split("\n")[0] for name, file in _FILES.items()}


@dataclass(frozen=True)
class Imported:
    """What was read: so many queries and calls; `notes` is what of the trace is not as it was."""

    queries: int
    calls: int
    notes: list[str]


def import_trace(name: str, path: Path, out: Path) -> Imported:
    """Reads a trace and writes it as a recording, query by query. Raises ScenarioError, which names the file and the place."""
    if name not in _FILES:
        raise ScenarioError(f"import {name}: there is no such format, but {', '.join(_FILES)}")
    if not path.exists():
        raise ScenarioError(f"{path}: there is no such file or folder: give a trace in the form of {name}")
    trace, recorder = Trace(path), Recorder(out, name)
    try:
        for due_at, calls in import_module(f"{__name__}.{_FILES[name]}").read(trace):
            recorder.add(calls, due_at)
        if not recorder.queries:
            raise ScenarioError(f"{path}: holds no call that can be made again")
    except (msgspec.MsgspecError, KeyError, ValueError) as e:
        recorder.discard()
        said = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e)
        raise ScenarioError(f"{trace.at}: {said}: that is not as {name} has it") from None
    except BaseException:
        recorder.discard()
        raise
    recorder.close()
    return Imported(recorder.queries, recorder.calls, list(trace.notes))
