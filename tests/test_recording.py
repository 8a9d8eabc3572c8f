"""Recordings: what is written is what is re-enacted, and what cannot be re-enacted is said."""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fanmark.agents.steps import Read, Step
from fanmark.loadgen.cli_common import checked_scenario
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.recording import RecordedCall, Recorder, Recording, Said, steps_of, text_id
from fanmark.loadgen.scenario_check import override_load


def call(number: int, after: list[int], due_at: float, done_at: float, **more: Any) -> RecordedCall:
    given: dict[str, Any] = {"kind": "call", "role": "agent", "round": 1, "output_tokens": 10, "messages": []} | more
    return RecordedCall(
        query=0, arm="", call=number, after=after, due_at=due_at, sent_at=due_at, done_at=done_at, **given
    )


def chain() -> list[RecordedCall]:
    """A call, a tool call that takes 2 s, and after another second of thought a call that reads both."""
    return [
        call(1, [], 5.0, 6.0, messages=[Said("s", 100, "system"), Said("q", 20)]),
        call(2, [1], 6.0, 8.0, kind="tool_call", output_tokens=None, messages=None),
        call(
            3,
            [2],
            9.0,
            10.0,
            messages=[Said("s", 100, "system"), Said("q", 20), Said("", 10, "assistant", 1), Said("", 33, "user", 2)],
        ),
    ]


@pytest.mark.parametrize("lap", [0, 2])
def test_what_a_message_begins_with_is_a_text_of_the_lap(lap: int) -> None:
    begun = Said("long", 200, begins=(("a", 64), ("b", 60)))
    assert msgspec.json.decode(msgspec.json.encode(begun), type=Said) == begun
    (step,) = steps_of([call(1, [], 0.0, 1.0, messages=[begun])], lap)
    more = (lap,) if lap else ()
    assert step.reads[0].begins == ((("recorded", "a", *more), 64), (("recorded", "b", *more), 60))


def test_steps_wait_as_the_recorded_ones_did() -> None:
    first, tool, last = steps_of(chain())
    own = (Read(("recorded", "s"), 100, "system"), Read(("recorded", "q"), 20))
    assert first == Step(("reply", 1), 10, reads=own)
    assert tool == Step(("result", 2), 33, after=(("reply", 1),), seconds=2.0)
    said = (Read(("reply", 1), 10, "assistant"), Read(("result", 2), 33))
    assert last == Step(("reply", 3), 10, after=(("reply", 1), ("result", 2)), pause_s=1.0, reads=own + said)


def test_who_waited_for_a_failed_call_waits_for_what_that_had_waited_for() -> None:
    calls = chain()
    calls[1].error = "tool_transport"
    first, last = steps_of(calls)
    assert last.after == (first.writes,)
    assert last.pause_s == pytest.approx(3.0)
    assert last.reads[3] == Read(("recorded", "0-2"), 33), "nobody says this now: its text is made up"


def test_a_reply_that_comes_back_shorter_is_a_text_of_its_own() -> None:
    calls = chain()
    calls[0].output_tokens = 500  # 490 of them reasoning
    assert steps_of(calls)[2].reads[2] == Read(("recorded", "0-1"), 10, "assistant")


def test_a_recording_is_read_in_the_order_of_starts_and_begins_again_at_its_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", "tap")
    for at in (7.0, 3.0, 5.0):
        recorder.add([call(1, [], at, at + 1, output_tokens=int(at))], at)
    recorder.close()
    recording = Recording(tmp_path / "r")
    assert list(recording.starts_s()) == [0.0, 2.0, 4.0]
    assert [recording.steps(i)[0].tokens for i in range(-1, 5)] == [7, 3, 5, 7, 3, 5]


def test_what_failed_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", "tap")
    recorder.add([call(1, [], 0.0, 1.0, error="timeout")], 0.0)
    recorder.add([call(1, [], 1.0, 2.0)], 1.0)
    recorder.close()
    recording = Recording(tmp_path / "r")
    assert (len(recording), recording.left_out) == (1, 1)


def test_a_folder_that_holds_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"holds no recording \(No such file or directory\)"):
        Recording(tmp_path)
    recorder = Recorder(tmp_path / "r", "tap")
    recorder.add([call(1, [], 0.0, 1.0, messages=None)], 0.0)
    recorder.close()
    with pytest.raises(ScenarioError, match="do not say what they read"):
        Recording(tmp_path / "r")
    with pytest.raises(ScenarioError, match="no query of arm 'other' can be re-enacted: there are tap"):
        Recording(tmp_path / "r", "other")
    with pytest.raises(ScenarioError, match="holds another run"):
        Recorder(tmp_path / "r", "tap")


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", "tap")
    for i in range(2):
        recorder.add([call(1, [], i, i + 1.0)], i)
    recorder.close()
    for name in ("calls.jsonl", "queries.jsonl"):
        whole = (tmp_path / "r" / name).read_bytes()
        (tmp_path / "r" / name).write_bytes(whole[:-20])
    assert len(Recording(tmp_path / "r")) == 1


def test_ids_tell_nothing_without_the_salt() -> None:
    assert text_id(b"a", "hello") == text_id(b"a", b"hello")
    assert text_id(b"a", "hello") != text_id(b"b", "hello")


TAPPED = """
tapped = true
[load]
process = "replay"
[[arm]]
name = "tapped"
topology = "replay"
path = "."
arm = "tapped"
baseline = true
[[arm]]
name = "unattributed"
topology = "replay"
path = "."
arm = "unattributed"
"""


@pytest.mark.parametrize(
    ("flags", "load"),
    [
        ((None, None, None, None), ("open", "replay", 3)),
        ((2, None, None, None), ("open", "replay", 2)),
        ((None, None, 9.0, None), ("open", "poisson", 3)),
        ((None, None, None, 2), ("closed", "poisson", 3)),
    ],
)
def test_what_was_tapped_is_made_again_at_its_times_or_at_any_rate(
    flags: tuple[Any, ...], load: tuple[Any, ...], tmp_path: Path
) -> None:
    """Of three queries; the arm for what could not be attributed has none that succeeded, and is left out."""
    recorder = Recorder(tmp_path, "tapped")
    for n in range(3):
        recorder.add(chain(), float(n))
    recorder.close()
    raw = tomllib.loads(TAPPED)
    override_load(raw, *flags, None)
    scenario, _ = checked_scenario(raw, str(tmp_path / "scenario.toml"), [])
    assert [(arm.name, arm.baseline) for arm in scenario.arms] == [("tapped", True)]
    assert (scenario.load.mode, scenario.load.process, scenario.load.queries) == load


def test_a_replay_at_the_recorded_times_has_no_other_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "tapped")
    recorder.add(chain(), 0.0)
    recorder.close()
    raw = tomllib.loads(TAPPED)
    override_load(raw, None, 30.0, None, None, None)
    with pytest.raises(ScenarioError, match="duration = 30: a replay of arrivals ends with them"):
        checked_scenario(raw, str(tmp_path / "scenario.toml"), [])
