"""The report and the live page as a browser shows them: a phone's width, a desk's, and in the middle of a run."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import needs_chromium, opened
from pages import parse

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.course import Course
from fanmark.loadgen.report.live_page import LivePage
from fanmark.loadgen.samples import ArmSample, Sample, ServerSample
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.tally import Tally

pytestmark = [pytest.mark.real, needs_chromium]

_FRAME = """<!doctype html><title>waiting</title><iframe src="{src}" style="border:0;width:{width}px;height:900px"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = async () => {{ document.title = JSON.stringify(await look(frame.contentDocument)); }};
async function look(page) {{ {look} }}
</script>"""


@contextmanager
def served(pages: Mapping[str, Callable[[], str]]) -> Iterator[str]:
    """Pages by their path, so that one may look into another."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            self.send_response(404 if page is None else 200)
            self.send_header(
                "Content-Type", "text/javascript" if self.path.endswith(".js") else "text/html; charset=utf-8"
            )
            self.end_headers()
            self.wfile.write((page() if page is not None else "").encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def looked_at(pages: Mapping[str, Callable[[], str]], look: str, width: int, after_ms: int = 1000) -> Any:
    """What this JavaScript finds in the page "/"."""
    frame = _FRAME.format(src="/", width=width, look=look)
    with served({**pages, "/frame": lambda: frame, "/favicon.ico": lambda: ""}) as url:
        return json.loads(parse(opened(f"{url}/frame", after_ms)).all("title")[0].text)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    raw, source = scenario_check.read("quickstart")
    scenario_check.override_load(raw, 12, None, 1.0, None, None)
    out = tmp_path_factory.mktemp("simulated") / "run"
    simulate(scenario_check.check(raw, source, topologies()), topologies(), Options(out, "0", []))
    return (out / "report.html").read_text()


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_the_report_fits_the_width_and_draws_everything(report: str, width: int) -> None:
    look = """return {
        wide: page.documentElement.scrollWidth,
        flat: [...page.querySelectorAll("svg[role=img]")].filter((each) => each.getBoundingClientRect().width < 200).length,
        pictures: page.querySelectorAll("svg[role=img]").length,
        small: [...page.querySelectorAll("text, p, td, th, li, pre")].map((each) => parseFloat(getComputedStyle(each).fontSize))
            .filter((size) => size < 11).length,
        outside: [...page.querySelectorAll("figure rect, figure text")].map((each) => each.getBoundingClientRect()).filter(
            (box) => box.left < 0 || box.right > page.documentElement.clientWidth + 1).length,
    }"""
    found = looked_at({"/": lambda: report}, look, width)
    assert found == {"wide": width, "flat": 0, "pictures": report.count('role="img"'), "small": 0, "outside": 0}


def course(seconds: Iterator[float]) -> Course:
    """Of a run whose clock goes on by a second whenever it is read."""
    found = Course(Tally({"single": "single", "debate": "debate"}, "single"), 24, lambda: next(seconds))
    for at in (1.0, 2.0, 3.0):
        found.add(
            Sample(at, {"default": ServerSample(running=2.0, waiting=0.0, kv_use=0.1)}, {"single": ArmSample(1, 1)})
        )
    return found


def test_the_live_page_keeps_up_and_keeps_what_the_reader_has_opened() -> None:
    watched = course(iter(map(float, range(1000))))
    pages = {
        path: lambda page=page: page("")[1].decode() for path, page in LivePage(watched, "a <b> run").pages().items()
    }
    look = """
        const before = page.querySelector("h1").textContent, details = page.querySelector("details");
        details.open = true;
        details.querySelector("summary").focus();
        await new Promise((done) => setTimeout(done, 3500));
        return { before, after: page.querySelector("h1").textContent, open: page.querySelectorAll("details[open]").length,
            same: page.querySelector("details") === details, focus: page.activeElement.tagName };
    """
    found = looked_at(pages, look, 390, 5000)
    times = [int(re.fullmatch(r"a <b> run, running for (\d+) s", found[when])[1]) for when in ("before", "after")]
    assert times[1] >= times[0] + 2
    assert (found["open"], found["same"], found["focus"]) == (1, False, "SUMMARY")


def test_once_the_run_has_ended_the_live_page_becomes_its_report(report: str) -> None:
    watched = course(iter(map(float, range(1000))))
    pages = {path: lambda page=page: page("")[1].decode() for path, page in LivePage(watched, "run").pages().items()}

    def ends() -> str:
        """Asked for what is new, the run has ended."""
        watched.report = report
        return pages["/live"]()

    with served({**pages, "/live": ends, "/favicon.ico": lambda: ""}) as url:
        found = parse(opened(f"{url}/", 3000))
    assert [node.text for node in found.all("h1")] == [node.text for node in parse(report).all("h1")]
    assert found.all("script") == []


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return bytes(reply.read()).decode()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_browser_shows_a_run_in_its_middle_and_its_report_at_its_end(tmp_path: Path, workers: int) -> None:
    short = ["workload.answer=20", "workload.judge_answer=20", "arm.mcp-chain.tool_calls=2", "workload.action=8"]
    command = [
        *(
            sys.executable,
            "-m",
            "fanmark.loadgen.cli",
            "run",
            "--out",
            str(tmp_path / "run"),
            "--queries",
            "20",
            "--rate",
            "4",
        ),
        *("--workers", str(workers), "--metrics-hold", "60", *(part for each in short for part in ("--set", each))),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = next(line.split()[1] for line in process.stderr if line.startswith("live"))
            _until(lambda: _done(fetched(url)) >= 3)
            before = _done(fetched(url))
            page = parse(opened(url))
            after = _done(fetched(url))
            rows = page.all("table")[0].rows()
            assert rows[0][:3] == ["arm", "done", "failed"]
            assert before <= sum(int(row[1]) for row in rows[1:]) <= after <= 60
            assert "running for" in page.all("h1")[0].text
            _until(lambda: "running for" not in fetched(url))
            assert fetched(url) == (tmp_path / "run" / "report.html").read_text()
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 0


def _done(page: str) -> int:
    found = re.search(r"(\d+) of 60 queries done", page)
    return int(found[1]) if found else 0


def _until(happened: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)
