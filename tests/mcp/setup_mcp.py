"""Install eight real MCP servers for `make test-mcp`: four by npm, four by pip in virtual environments of their own.

    python tests/mcp/setup_mcp.py [--folder .mcp]

They are kept between runs, and made anew only when the versions below have changed. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMP = ".fanmark-stamp"
NPM = tuple(
    f"@modelcontextprotocol/server-{name}@2026.8.31"
    for name in ("everything", "filesystem", "memory", "sequential-thinking")
)
# By the virtual environment's name. The SQLite server is older than version 2 of the SDK, and breaks with it.
PIP = {
    "python": ("mcp-server-time==2026.10.19", "mcp-server-git==2026.10.19", "mcp-server-fetch==2026.10.24"),
    "sqlite": ("mcp-server-sqlite==2025.4.25", "mcp<2"),
}


def made(folder: Path, packages: Sequence[str]) -> bool:
    """Whether the folder holds just these; if not, it is emptied."""
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == "\n".join(packages):
        print(f"mcp: {folder} is up to date")
        return True
    print(f"mcp: installing {', '.join(packages)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return False


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".mcp")
    top, started_at = parser.parse_args().folder.resolve(), time.monotonic()
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("mcp: npm is not installed, and four of the servers are npm packages: install node 20 or newer")
    if not made(top / "npm", NPM):
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(top / "npm"), *NPM], check=True
        )
        (top / "npm" / STAMP).write_text("\n".join(NPM))
    for name, packages in PIP.items():
        if not made(top / name, packages):
            subprocess.run([sys.executable, "-m", "venv", str(top / name)], check=True)
            pip = [str(top / name / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, *packages], check=True)
            (top / name / STAMP).write_text("\n".join(packages))
    print(f"mcp: ready after {time.monotonic() - started_at:.0f} s")


if __name__ == "__main__":
    main()
