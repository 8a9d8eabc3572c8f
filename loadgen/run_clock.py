"""The clock of a run in real time."""

import time


class RunClock:
    """Seconds since the run's start, in the servers' seconds: a stub slowed by `time_scale`, and its tools, are a slower clock, not slower
    servers. Before `start` they count from when the clock was made. `began_at` is the start as Unix time, once it is known."""

    def __init__(self, time_scale: float) -> None:
        self.time_scale = time_scale
        self.origin_s = time.monotonic()
        self.began_at: float | None = None

    def start(self, origin_s: float) -> None:
        """Sets the run's start, an instant of the monotonic clock, which all processes of a machine share."""
        self.origin_s = origin_s
        self.began_at = time.time() - time.monotonic() + origin_s

    def now(self) -> float:
        """The run's time."""
        return (time.monotonic() - self.origin_s) / self.time_scale
