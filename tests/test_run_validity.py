"""The ticks of a run, wherever they are told: table, summary, metrics and exit code."""

import json
import re
import signal
import time
import urllib.request
from pathlib import Path

import pytest
from test_run import BRIEF, started

from fanmark.loadgen.cli import exit_code

TICKS = ("counted", "reconciled", "alone", "steady", "uncontaminated", "client_ok")
TITLES = ("counted", "reconciled", "alone", "steady", "uncontaminated", "client ok")


@pytest.mark.real
def test_ticks_stand_above_the_table_in_the_summary_and_in_the_metrics(tmp_path: Path) -> None:
    flags = ["--queries", "2", "--rate", "4", "--metrics-hold", "60", *BRIEF]
    with started(tmp_path / "run", *flags) as process:
        assert process.stderr is not None
        url = next(m[0] for line in process.stderr if (m := re.search(r"http://\S+/metrics", line)))
        give_up_at = time.monotonic() + 60
        text = ""
        while "fanmark_validity{" not in text:
            assert time.monotonic() < give_up_at and process.poll() is None
            time.sleep(0.05)
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        process.send_signal(signal.SIGINT)  # enough of holding: the run itself was whole
        table, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    validity = json.loads((tmp_path / "run" / "summary.json").read_text())["validity"]
    told = {tick: float(ok) for tick, ok in validity.items() if isinstance(ok, bool)}
    assert set(TICKS) | {"stub_on_time"} == set(validity) - {"reasons"} == set(validity["reasons"])
    assert {t: float(v) for t, v in re.findall(r'fanmark_validity{tick="(\w+)"} (\S+)', text)} == told
    head = table[: table.index("per query")]
    for tick, title in zip(TICKS, TITLES, strict=True):
        word = {True: "ok", False: "FAILED", None: "not known"}[validity[tick]]
        assert re.search(rf"{word} +{title} +{re.escape(validity['reasons'][tick])}", head), head


@pytest.mark.parametrize(
    ("ticks", "objective", "ended", "met", "lost_at", "codes"),
    [
        ({}, None, None, True, None, (0, 0)),
        ({"steady": None, "alone": None}, True, None, True, None, (0, 0)),  # what cannot be known is no failure
        ({"counted": False}, None, None, False, None, (1, 1)),
        ({"alone": False}, None, None, True, None, (0, 1)),
        ({"stub_on_time": False}, None, None, True, None, (0, 1)),
        ({}, False, None, True, None, (0, 1)),  # a missed objective
        ({"alone": False}, False, None, False, None, (5, 5)),  # a missed threshold
        ({"reconciled": None}, True, None, False, 3.5, (1, 1)),  # a lost worker
        ({}, None, "threshold", True, None, (5, 5)),
        ({"counted": False}, False, "interrupted", False, None, (130, 130)),
        ({"alone": False}, None, "budget", False, None, (4, 4)),
    ],
)
def test_the_exit_code_without_strict_and_with(
    ticks: dict[str, bool | None],
    objective: bool | None,
    ended: str | None,
    met: bool,
    lost_at: float | None,
    codes: tuple[int, int],
) -> None:
    validity = dict.fromkeys(TICKS, True) | ticks | {"reasons": {}}
    arm = {"objective": None if objective is None else {"met": objective}}
    summary = {"validity": validity, "arms": {"a": arm}, "ended": {"why": ended} if ended else None}
    summary["thresholds"] = [{"met": True}, {"met": met}]
    summary["client"] = {"by_worker": {"0": {"lost_at": None}, "1": {"lost_at": lost_at}}}
    assert tuple(exit_code(summary, strict) for strict in (False, True)) == codes
