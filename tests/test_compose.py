"""The stack's files, held by what reads them: the real `docker compose config`, promtool, and what is on disk."""

import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from running_prometheus import needs_promtool

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "compose"
FILE = FOLDER / "compose.yaml"
SERVICES = {
    "cpu": {"stub", "tools", "load", "prometheus", "grafana"},
    "gpu": {"vllm", "tools", "load", "prometheus", "grafana"},
}


def config(file: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """`docker compose config`: the program itself; the package's own command swallows its exit code."""
    spec = find_spec("compose")
    assert spec is not None and spec.origin is not None
    command = [str(Path(spec.origin).with_name("docker-compose")), "-f", str(file), *flags]
    given = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(command, capture_output=True, text=True, env=given)


def services(profile: str) -> dict[str, Any]:
    done = config(FILE, "--profile", profile, "config", "--format", "json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


@pytest.mark.parametrize("profile", SERVICES)
def test_compose_takes_the_file_and_starts_what_the_profile_needs(profile: str) -> None:
    found = services(profile)
    assert set(found) == SERVICES[profile]
    (target,) = set(found) & {"stub", "vllm"}
    assert found[target]["networks"]["default"]["aliases"] == ["target"]
    assert found[target]["healthcheck"]["test"][0] == "CMD"
    for service in found.values():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind" and volume["target"] != "/runs":
                assert volume["read_only"] and Path(volume["source"]).exists(), volume
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1"
        assert ":latest" not in service["image"]
    command = found["load"]["command"]
    assert 'tools.server=[{url="http://tools:9000/mcp"}]' in command and "http://target:8000/v1" in command


@pytest.mark.parametrize(
    ("line", "other"),
    [("    init: true", "    innit: true"), ("depends_on: [prometheus]", "depends_on: [prometeus]"), ("<<: *answers", "<<: *answer")],
)  # fmt: skip
def test_compose_would_tell_of_a_mistake(line: str, other: str, tmp_path: Path) -> None:
    text = FILE.read_text().replace(line.strip(), other.strip())
    assert text != FILE.read_text()
    (tmp_path / "compose.yaml").write_text(text)
    assert config(tmp_path / "compose.yaml", "--profile", "cpu", "config", "-q").returncode != 0


def test_everything_that_is_scraped_is_a_service_at_its_port() -> None:
    scraped = dict(re.findall(r'targets: \["(\w+):(\d+)"\]', (FOLDER / "prometheus.yml").read_text()))
    found = services("cpu")
    ports = {}
    for name, service in found.items():
        flags = dict(zip(service["command"] or [], (service["command"] or [])[1:], strict=False))
        port = flags.get("--metrics-port") or flags.get("--port")
        if port is not None:
            ports["target" if name == "stub" else name] = port
    assert scraped == ports == {"load": "9464", "target": "8000", "tools": "9000"}
    assert "--port 8000" in " ".join(services("gpu")["vllm"]["command"])


@needs_promtool
def test_promtool_takes_the_prometheus_config_with_its_rules(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "prometheus.yml", tmp_path)
    shutil.copytree(ROOT / "dashboards" / "rules", tmp_path / "rules")
    done = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "14 rules found" in done.stdout, done.stdout + done.stderr


def test_grafana_finds_its_data_source_and_the_dashboards() -> None:
    grafana = services("cpu")["grafana"]
    places = {volume["target"]: Path(volume["source"]) for volume in grafana["volumes"]}
    provisioning = Path("/etc/grafana/provisioning")
    source = next(places[str(provisioning / "datasources")].glob("*.yaml")).read_text()
    assert "type: prometheus" in source and "url: http://prometheus:9090" in source
    provider = next(places[str(provisioning / "dashboards")].glob("*.yaml")).read_text()
    (path,) = re.findall(r"path: (/[\w/]+)", provider)
    assert sorted(each.stem for each in places[path].glob("*.json")) == ["fan-out", "run", "server"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (places[str(home.parent)] / home.name).exists()


def test_the_image_has_all_that_the_package_is_made_of() -> None:
    copied = set()
    for line in re.findall(r"^COPY (.+)$", (FOLDER / "Dockerfile").read_text(), re.M):
        copied |= set(line.split()[:-1])
    allowed = {
        line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert copied == allowed and {"agents", "servers", "loadgen", "fanmark", "pyproject.toml"} <= copied
    assert all((ROOT / name).exists() for name in copied)
