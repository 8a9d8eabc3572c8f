"""The scheduler decides as vLLM's own did, step for step."""

import json
from pathlib import Path

import pytest

from fanmark.loadgen.replay import replay_recording, replay_schedule

RECORDINGS = sorted(Path(__file__).parent.joinpath("data/vllm_schedules").rglob("*.json"))
FIRST = Path(__file__).parent / "data/vllm_schedules/1.json"


def test_all_recordings_are_there() -> None:
    assert len(RECORDINGS) >= 60


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_every_step_equals_vllms(path: Path) -> None:
    check = replay_schedule(path)
    assert check.equal, str(check)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheduled", {"0": 63}),
        ("cached", {}),
        ("running", 2),
        ("waiting", 1),
        ("usage", 0.05),
        ("preempted", ["0"]),
        ("finished", ["0"]),
    ],
)
def test_a_difference_is_found_and_named(field: str, value: object) -> None:
    recording = json.loads(FIRST.read_text())
    assert recording["steps"][0][field] != value
    recording["steps"][0][field] = value
    check = replay_recording(recording, "edited")
    assert (check.equal, check.first_difference, check.differs.split(":")[0]) == (False, 0, field)


def test_a_recording_that_ends_too_early_is_no_success() -> None:
    recording = json.loads(FIRST.read_text())
    del recording["steps"][-1]
    assert not replay_recording(recording, "cut").equal


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": {"policy": "lifo"}}'], ids=["empty", "list", "no config", "config"]
)
def test_what_is_no_recording_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        replay_schedule(file)
