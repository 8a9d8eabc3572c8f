"""A real Prometheus as a process, for tests: it scrapes one address each second and keeps what it saw in a folder of the test's."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from free_port import free_port

ABSENT = "is not installed: apt-get install prometheus"
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason=f"prometheus {ABSENT}")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason=f"promtool {ABSENT}")


class Prometheus:
    """Answers queries."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """What the API says. An expression that it refuses fails the test."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as e:
            raise AssertionError(f"{parameters}: {e.read().decode()}") from None

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def series(self, expr: str, start_at: float, end_at: float) -> list[dict[str, Any]]:
        """Each series of an expression with its values, those that are no number left out, over this time."""
        found = self.get("query_range", query=expr, start=str(start_at), end=str(end_at), step="1")["result"]
        series = [(each["metric"], [float(v) for _, v in each["values"] if v != "NaN"]) for each in found]
        return [{"labels": labels, "values": values} for labels, values in series if values]


@contextmanager
def scraping(port: int, folder: Path, rules: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes this port of loopback; it has ended when the block ends."""
    own = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "fanmark", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{own}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as process:
        try:
            found, give_up_at = Prometheus(f"http://127.0.0.1:{own}"), time.monotonic() + 30
            while not found.ready():
                assert process.poll() is None and time.monotonic() < give_up_at, log.read_text()
                time.sleep(0.05)
            yield found
        finally:
            process.terminate()
            process.wait(10)
