"""Install agent frameworks for `make test-frameworks`: each in a virtual environment of its own, outside the checkout.

    python tests/frameworks/setup_frameworks.py [--folder ~/.cache/fanmark/frameworks]

They are kept between runs, and made anew only when their pins (requirements/NAME.txt) have changed. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PINS = Path(__file__).resolve().parent / "requirements"
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fanmark" / "frameworks"
STAMP = ".fanmark-stamp"


def install(folder: Path, pins: Path) -> None:
    """The packages that `pins` lists, in a virtual environment at `folder`, unless they are there already."""
    stamp, wanted = folder / STAMP, f"{sys.version}\n{pins.read_text()}"
    if stamp.is_file() and stamp.read_text() == wanted:
        print(f"frameworks: {folder} is up to date")
        return
    print(f"frameworks: installing {pins.stem}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "-r", str(pins)], check=True)
    stamp.write_text(wanted)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder, started_at = parser.parse_args().folder.resolve(), time.monotonic()
    for pins in sorted(PINS.glob("*.txt")):
        install(folder / pins.stem, pins)
    print(f"frameworks: ready after {time.monotonic() - started_at:.0f} s")


if __name__ == "__main__":
    main()
