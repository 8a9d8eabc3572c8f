"""What a target's GPUs draw: told by a DCGM exporter, or by NVML of this host. Joules since they were reset, and watts now.

NVML needs the package nvidia-ml-py, which is imported only where it is asked for.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from fanmark.loadgen.errors import UnreachableError

NVML = "nvml"
_SAMPLE = re.compile(r"(DCGM_FI_DEV_\w+)(?:\{[^}]*\})?\s+(\S+)")
_JOULES = {"DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("joules", 1e-3), "DCGM_FI_DEV_POWER_USAGE": ("watts", 1.0)}

Look = Callable[[], dict[str, float]]


def parse_dcgm(text: str) -> dict[str, float]:
    """`joules` and `watts` of all GPUs that an exporter tells of, as far as it does; of MIG slices that share a GPU each is told once."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None and match[1] in _JOULES:
            word, scale = _JOULES[match[1]]
            try:
                value = float(match[2]) * scale
            except ValueError:
                continue
            if math.isfinite(value):
                found.setdefault(word, []).append(value)
    return {word: math.fsum(values) for word, values in found.items()}


def nvml() -> Look:
    """All GPUs of this host. Raises UnreachableError where they cannot be asked."""
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UnreachableError(
            'power_url = "nvml": the package nvidia-ml-py is not installed: pip install fanmark[nvml], or leave power_url out'
        ) from None
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as e:
        raise UnreachableError(f'power_url = "nvml": no GPU can be asked here ({e}): leave power_url out') from None
    return lambda: _asked(pynvml, gpus)


def _asked(pynvml: Any, gpus: Sequence[Any]) -> dict[str, float]:
    try:
        return {
            "joules": sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus) * 1e-3,
            "watts": sum(pynvml.nvmlDeviceGetPowerUsage(gpu) for gpu in gpus) * 1e-3,
        }
    except pynvml.NVMLError:
        return {}
