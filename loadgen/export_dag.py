"""A recording as AIPerf's dag_jsonl (imports/aiperf_dag.py says what that is), so that AIPerf can send what a replay sends.

A query whose calls each go on where the one before ended is a conversation: AIPerf reads on with the server's own replies, as a replay
does. Any other is an orchestrator whose rounds are its calls by depth; what they read of each other's replies are texts of as many
tokens, and each waits for all of the round before: as many calls and tokens, but nothing that was generated is found again. Tool calls
are waited for, not made. Texts have exactly their lengths by the tokenizer of our stub, and about that by others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents.runtime import Key
from fanmark.agents.steps import Read, Step
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.recording import Recording
from fanmark.servers.prose import Filler


@dataclass(frozen=True)
class Exported:
    """How many queries were written, and how many of them are conversations."""

    queries: int
    conversations: int


def export(recording: Recording, out: Path) -> Exported:
    """Writes all queries of a recording. Raises ScenarioError where the file is there or cannot be written."""
    filler, conversations, encoder = Filler(), 0, msgspec.json.Encoder()
    try:
        with out.open("xb") as file:
            for i in range(len(recording)):
                steps = recording.steps(i)
                calls = [step for step in steps if step.is_call]
                if not calls:
                    continue
                chain = is_chain(calls)
                conversations += chain
                lines = [_conversation(f"q{i}", steps, filler)] if chain else _rounds(f"q{i}", steps, filler)
                for line in lines:
                    file.write(encoder.encode(line) + b"\n")
    except OSError as e:
        raise ScenarioError(f"--out {out}: cannot be written ({e.strerror}): give a new file") from None
    return Exported(len(recording), conversations)


def is_chain(calls: Sequence[Step]) -> bool:
    """Whether each call reads all that the one before read, its reply, and something new."""
    return all(
        later.reads[: len(call.reads)] == call.reads
        and len(later.reads) > len(call.reads) + 1
        and later.reads[len(call.reads)].as_read == call.writes
        for call, later in pairwise(calls)
    )


def _conversation(name: str, steps: Sequence[Step], filler: Filler) -> dict[str, Any]:
    waits, known, turns = _waits_s(steps), 0, []
    for step in steps:
        if step.is_call:
            turns.append(_turn(name, step, step.reads[known:], filler, seed=known == 0) | _delay(waits[step.writes]))
            known = len(step.reads) + 1
    return {"session_id": name, "turns": turns}


def _rounds(name: str, steps: Sequence[Step], filler: Filler) -> Iterator[dict[str, Any]]:
    """The orchestrator, then its branches."""
    depths: dict[Key, int] = {}
    waits, levels = _waits_s(steps), dict[int, list[Step]]()
    for step in steps:
        depths[step.writes] = step.is_call + max((depths[key] for key in step.after), default=0)
        if step.is_call:
            levels.setdefault(depths[step.writes], []).append(step)
    rounds: list[dict[str, Any]] = []
    for level in sorted(levels):
        think_s = min(waits[step.writes] for step in levels[level])
        if rounds and think_s > 0:  # it is the round before that waits
            rounds[-1]["think_time_ms"] = think_s * 1000
        rounds.append({"spawns": [_branch(name, step) for step in levels[level]]})
    yield {"session_id": name, "orchestrator": True, "rounds": rounds}
    for step in steps:
        if step.is_call:
            yield {
                "session_id": _branch(name, step),
                "context_mode": "message_array_with_responses",
                "turns": [_turn(name, step, step.reads, filler, seed=True)],
            }


def _branch(name: str, step: Step) -> str:
    return f"{name}-{step.writes[1]}"


def _waits_s(steps: Sequence[Step]) -> dict[Key, float]:
    """How long after the last call before it each step was made, if calls took no time."""
    over_at: dict[Key, float] = {}
    called_at: dict[Key, float] = {}  # the last call up to here
    found: dict[Key, float] = {}
    for step in steps:
        made_at = step.pause_s + max((over_at[key] for key in step.after), default=0.0)
        before_at = max((called_at[key] for key in step.after), default=0.0)
        found[step.writes] = made_at - before_at
        over_at[step.writes] = made_at + step.seconds
        called_at[step.writes] = made_at if step.is_call else before_at
    return found


def _turn(name: str, step: Step, reads: Sequence[Read], filler: Filler, *, seed: bool) -> dict[str, Any]:
    messages = [_message(name, read, filler, first=seed and i == 0) for i, read in enumerate(reads)]
    extra = {"ignore_eos": True, "min_tokens": step.sample_tokens} | ({"n": step.samples} if step.samples > 1 else {})
    return {"messages": messages, "max_tokens": step.sample_tokens, "extra": extra}


def _delay(wait_s: float) -> dict[str, float]:
    return {"delay": wait_s * 1000} if wait_s > 0 else {}


def _message(name: str, read: Read, filler: Filler, *, first: bool) -> dict[str, str]:
    kind, author = read.key[0], read.author
    text = "/".join(map(str, read.key)) if kind == "recorded" else f"{name}/{kind}/{read.key[1]}"
    role = "user" if author == "tool" or (author == "system" and not first) else author
    return {"role": role, "content": filler.text(read.tokens, text)}
