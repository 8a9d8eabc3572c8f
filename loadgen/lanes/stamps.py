"""When bytes arrived, on the run's clock: from the kernel's receive stamps (Linux, SO_TIMESTAMPNS), where there are any.

The kernel stamps by the wall clock. Its distance to the monotonic clock is taken anew at each look; where it has moved since the last, the
wall clock was set, and what is read at this look has the instant of the look. So has what bears a stamp that cannot be: older than what
came before it, or in the future.
"""

import socket
import time
from collections.abc import Callable, Sequence
from struct import Struct

CLOCK_SET_S = 0.0005  # a larger change of the clocks' distance between two looks is no slewing
FUTURE_S = 0.05  # what arrives while reading goes on is stamped after the look
TIMESTAMPNS = 35  # SO_TIMESTAMPNS of Linux on 64 bits, which Python does not name

_TIMESPEC = Struct("@qq")
ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0


class ReceiveClock:
    """`now` is the run's clock, which runs `time_scale` times slower than seconds; `wall` is the clock that the kernel stamps with.
    `stamps` is whether the system gives stamps, as far as is known; `refused` counts those that could not be believed."""

    def __init__(self, now: Callable[[], float], time_scale: float, wall: Callable[[], float]) -> None:
        self._now = now
        self._time_scale = time_scale
        self._wall = wall
        self._apart_s: float | None = None  # wall clock less monotonic clock
        self._steady = False
        self._second = 0  # a whole second of the wall clock, and its instant
        self._second_at = self._look_at = 0.0
        self.looked_s = 0.0
        self.stamps = True
        self.refused = 0
        self.look()

    def ask_stamps(self, sock: socket.socket) -> None:
        """Has the kernel stamp what this socket receives."""
        if self.stamps:
            try:
                sock.setsockopt(socket.SOL_SOCKET, TIMESTAMPNS, 1)
            except OSError:
                self.stamps = False

    def look(self) -> None:
        """Reads all clocks; to be called before each round of reading."""
        for _ in range(3):  # again where the process was interrupted in between
            mono_s = time.monotonic()
            wall_s = self._wall()
            at = self._now()
            if time.monotonic() - mono_s < 0.0001:
                break
        apart_s = wall_s - mono_s
        self._steady = self._apart_s is not None and abs(apart_s - self._apart_s) < CLOCK_SET_S
        self._apart_s = apart_s
        self._second = int(wall_s)
        self._second_at = at - (wall_s - self._second) / self._time_scale
        self._look_at, self.looked_s = at, mono_s

    def instant(self, ancillary: Sequence[tuple[int, int, bytes]], not_before: float) -> float:
        """The instant of one read, from what recvmsg gave beside the data. Never before `not_before`."""
        if not ancillary:
            self.stamps = False
        elif self._steady:
            seconds, ns = _TIMESPEC.unpack(ancillary[0][2])
            at: float = self._second_at + (seconds - self._second + ns * 1e-9) / self._time_scale
            if not_before <= at <= self._look_at + FUTURE_S / self._time_scale:
                return at
            self.refused += 1
        else:
            self.refused += 1
        return max(self._look_at, not_before)
