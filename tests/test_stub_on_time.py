"""Whether the stub kept its own schedule: its lateness against a call's mean duration, and the time scale that is proposed."""

import pytest

from fanmark.loadgen.counters import LATENESS, parse
from fanmark.loadgen.reconcile import stub_on_time


def counters(*counts: float) -> dict[str, float]:
    """Cumulative counts at 0.01 s, 0.1 s and without bound, as a scrape gives them."""
    bounds = ("0.01", "0.1", "+Inf")
    text = "".join(f'{LATENESS}_bucket{{le="{b}"}} {c}\n' for b, c in zip(bounds, counts, strict=True))
    found = parse(f'vllm:prompt_tokens_total{{engine="0"}} 7\n{text}')
    assert found is not None and found.values["prompt_tokens"] == 7
    return dict(found.values)


@pytest.mark.parametrize(
    ("after", "mean_call_s", "time_scale", "on_time", "said"),
    [
        ((199, 200, 200), 1.0, 1.0, True, "at most 10 ms, 3 % of a call's mean duration is 30 ms"),
        ((197, 200, 200), 1.0, 1.0, False, "at most 100 ms, 3 % of a call's mean duration is 30 ms"),
        ((197, 200, 200), 4.0, 1.0, True, "at most 100 ms, 3 % of a call's mean duration is 120 ms"),
        ((197, 200, 200), 1.0, 1.0, False, "set stub.time_scale = 4"),  # 0.1 / 0.03, rounded up
        ((197, 200, 200), 2.0, 2.0, False, "set stub.time_scale = 4"),  # 2 x 0.1 / 0.06, rounded up
        ((100, 150, 200), 1.0, 1.0, False, "set stub.time_scale = 1000"),  # beyond the last bound
    ],
)
def test_lateness_is_held_against_a_calls_duration(
    after: tuple[float, ...], mean_call_s: float, time_scale: float, on_time: bool, said: str
) -> None:
    found = stub_on_time(counters(0, 0, 0), counters(*after), mean_call_s, time_scale)
    assert found is not None
    assert found[0] is on_time
    assert said in found[1]


def test_what_was_late_before_the_run_is_not_the_runs() -> None:
    found = stub_on_time(counters(0, 0, 500), counters(200, 200, 700), 1.0, 1.0)
    assert found is not None and found[0] is True


def test_another_server_or_nothing_due_tells_nothing() -> None:
    assert stub_on_time({"prompt_tokens": 1.0}, {"prompt_tokens": 2.0}, 1.0, 1.0) is None
    assert stub_on_time(counters(5, 5, 5), counters(5, 5, 5), 1.0, 1.0) is None
    assert stub_on_time(None, counters(1, 1, 1), 1.0, 1.0) is None
