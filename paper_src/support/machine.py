"""The memory of this process, and what else the machine does while something is timed."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # fields of psutil.cpu_times; guests are part of user


class Others:
    """A ``with`` block whose ``cores`` says how many processor cores other processes kept busy meanwhile.

    cores = (CPU seconds of all processes - CPU seconds of this one) / seconds, in the block so far, or in the whole
    block once it has ended. The arguments are there for tests.
    """

    def __init__(
        self, system: Callable = psutil.cpu_times, own: Callable | None = None, clock: Callable = time.perf_counter
    ) -> None:
        self._system, self._own, self._clock = system, own or psutil.Process().cpu_times, clock
        self._end: tuple[float, float] | None = None

    def __enter__(self) -> "Others":
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self._end = self._now()

    def _now(self) -> tuple[float, float]:
        """CPU seconds of others, seconds."""
        system, own = self._system(), self._own()
        return sum(getattr(system, name, 0) for name in BUSY) - own.user - own.system, self._clock()

    @property
    def cores(self) -> float:
        """0 where the system's clock, which ticks 100 times a second, lags behind the process's own."""
        used, seconds = (end - start for end, start in zip(self._end or self._now(), self._start, strict=True))
        return max(0.0, used / seconds) if seconds else 0.0


def peak_resident_bytes() -> int:
    """Highest resident set of this process so far, bytes.

    ``ru_maxrss`` alone would not do on Linux: a new process inherits its parent's peak.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
