"""A real browser in tests: Chromium without a screen. Nothing in it calls home, and it keeps nothing."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--disable-default-apps",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ),
]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")


def opened(url: str, after_ms: int = 100) -> str:
    """The page as it stands so many milliseconds of its own time after it has loaded; its scripts have run, and said nothing."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [
            CHROMIUM,
            *_FLAGS,
            f"--user-data-dir={Path(home)}",
            f"--virtual-time-budget={after_ms}",
            "--dump-dom",
            url,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0 and said == [], done.stderr
    return done.stdout
