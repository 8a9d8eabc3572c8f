"""The manifest for KubeRay, held against the part of its schema that it uses, and its parts against each other."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from setup_ray import RAY

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "compose" / "k8s"
READ = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))"  # Ray brings a YAML parser

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    python = ROOT / ".venv-ray" / "bin" / "python"
    found: dict[str, Any] = json.loads(
        subprocess.check_output([python, "-c", READ, FOLDER / "rayjob.yaml"], timeout=60)
    )
    return found


def test_it_has_the_shape_of_a_rayjob(job: dict[str, Any]) -> None:
    validator = Draft202012Validator(json.loads((Path(__file__).parent / "rayjob.schema.json").read_text()))
    assert list(validator.iter_errors(job)) == []
    for broken in ({"kind": "RayJobs"}, {"spec": {}}, {"spec": job["spec"] | {"entryPoint": ""}}):
        assert list(validator.iter_errors(job | broken))


def test_its_parts_fit_each_other(job: dict[str, Any]) -> None:
    """One worker a node and none beside the driver; volumes that are mounted exist; image and manifest have the Ray that is tested."""
    cluster = job["spec"]["rayClusterSpec"]
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0" and group["rayStartParams"]["num-cpus"] == "1"
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    pods = [each["template"]["spec"] for each in (head, group)]
    for pod in pods:
        (container,) = pod["containers"]
        assert {m["name"] for m in container.get("volumeMounts", [])} == {v["name"] for v in pod.get("volumes", [])}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["image"] == pods[0]["containers"][0]["image"]
        assert container["env"] == pods[0]["containers"][0]["env"]
    assert f"ray=={cluster['rayVersion']}" == RAY
    assert f"FROM rayproject/ray:{cluster['rayVersion']}-py311" in (FOLDER / "Dockerfile").read_text()


def test_its_command_is_one(job: dict[str, Any]) -> None:
    program, command, scenario, *flags = shlex.split(job["spec"]["entrypoint"])
    assert (program, command, scenario) == ("fanmark", "run", "/scenario/scenario.toml")
    assert flags[: flags.index("auto") + 1] == ["--ray", "auto"]
    done = subprocess.run(
        [Path(sys.executable).with_name("fanmark"), command, *flags, "--dry-run"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
