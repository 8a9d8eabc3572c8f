"""What the replica asks of a step-time law, and the time of a run of decode steps with as few questions as possible."""

from collections.abc import Sequence
from typing import Protocol

from fanmark.servers.engine.step_time import BatchShape

_STRAIGHT = 1e-12


class StepTime(Protocol):
    """A step-time law (`step_time.StepLaw` is one); all in seconds and joules. Longer contexts never make a step shorter."""

    def gpu_seconds(self, shape: BatchShape) -> float: ...
    def launch_seconds(self, shape: BatchShape) -> float: ...
    def lockstep_seconds(self, shapes: Sequence[BatchShape]) -> float: ...
    def decode_run_seconds(self, shape: BatchShape, steps: int) -> float: ...
    def joules(self, shape: BatchShape, seconds: float) -> float: ...
    def decode_run_joules(self, shape: BatchShape, steps: int, seconds: float) -> float: ...


class DecodeRun:
    """Up to `steps` pure-decode steps from `shape` on, each context a token longer in each.

    Where a step's time grows evenly, k steps take k * first + growth * k * (k - 1) / 2. As time never falls with the context and
    its growth changes at bends only, the run is straight if that holds in its middle as well; else the law is asked each time.
    """

    __slots__ = ("_growth_s", "_law", "_straight", "first_s", "launch_s", "shape", "slowdown", "steps")

    def __init__(self, law: StepTime, shape: BatchShape, steps: int, slowdown: float) -> None:
        self._law = law
        self.shape = shape
        self.steps = steps
        self.slowdown = slowdown
        self.first_s = law.gpu_seconds(shape)
        self.launch_s = law.launch_seconds(shape)
        self._growth_s, self._straight = 0.0, False
        if steps > 3:
            whole_s, half = law.decode_run_seconds(shape, steps), steps // 2
            self._growth_s = 2.0 * (whole_s / steps - self.first_s) / (steps - 1)
            half_s = half * (self.first_s + self._growth_s * (half - 1) / 2)
            self._straight = abs(law.decode_run_seconds(shape, half) - half_s) <= _STRAIGHT * whole_s

    def seconds(self, steps: int) -> float:
        """Time of the first `steps` steps."""
        if self._straight:
            return steps * (self.first_s + self._growth_s * (steps - 1) / 2) * self.slowdown
        return self._law.decode_run_seconds(self.shape, steps) * self.slowdown

    def steps_in(self, seconds: float, most: int) -> int:
        """How many steps, `most` at most, end in `seconds`."""
        low, high, guess = 0, most, most  # low do, high + 1 do not
        while low < high:
            run_s = self.seconds(guess)
            if run_s <= seconds:
                low = guess
            else:
                high = guess - 1
            # Steps grow slowly, so the share of the time is nearly the share of the steps
            near = int(seconds / run_s * guess) if run_s > 0.0 else high
            guess = min(max(near, low + 1), high)
        return low

    def joules(self, steps: int, seconds: float) -> float:
        return self._law.decode_run_joules(self.shape, steps, seconds)
