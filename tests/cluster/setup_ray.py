"""Install this project with Ray for `make test-ray`, into a virtual environment of its own: 290 MB, which the others do not need.

    python tests/cluster/setup_ray.py [--venv .venv-ray]

It is kept between runs, and made anew only when what it is made of has changed. Standard library only.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMP = ".fanmark-stamp"
RAY = "ray==2.60.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-ray")
    venv, started_at = parser.parse_args().venv.resolve(), time.monotonic()
    made_of = [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt")] + [
        RAY,
        sys.version,
        str(ROOT),
    ]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    stamp = venv / STAMP
    if stamp.is_file() and stamp.read_text() == digest:
        print(f"ray: {venv} is up to date")
        return
    print(f"ray: installing {RAY} into {venv}", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [
        str(venv / "bin" / "pip"),
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--constraint",
        "constraints.txt",
    ]
    subprocess.run([*pip, "--editable", ".[ray]", RAY], check=True, cwd=ROOT)
    stamp.write_text(digest)
    print(f"ray: ready after {time.monotonic() - started_at:.0f} s")


if __name__ == "__main__":
    main()
