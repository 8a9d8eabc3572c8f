"""JUnit XML, which build servers show: a test case for each thing that was judged. Pure, but for the file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from fanmark.loadgen.errors import LostError

_COUNTED = (("failures", "failed"), ("skipped", "skipped"))


@dataclass(frozen=True)
class Case:
    """One thing that was judged, and what is said of it."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    said: str


def document(suite: str, cases: Sequence[Case]) -> bytes:
    """The whole file. What XML cannot hold in what is said is left out."""
    count = {word: sum(case.outcome == outcome for case in cases) for word, outcome in _COUNTED}
    totals = {"tests": str(len(cases))} | {word: str(n) for word, n in count.items()}
    root = ElementTree.Element("testsuites", totals)
    within = ElementTree.SubElement(root, "testsuite", {"name": _clean(suite)} | totals)
    for case in cases:
        found = ElementTree.SubElement(within, "testcase", {"classname": _clean(suite), "name": _clean(case.name)})
        if case.outcome == "passed":
            ElementTree.SubElement(found, "system-out").text = _clean(case.said)
        else:
            kind = "failure" if case.outcome == "failed" else "skipped"
            ElementTree.SubElement(found, kind, {"message": _clean(case.said)})
    ElementTree.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root) + b"\n"


def write(path: Path, suite: str, cases: Sequence[Case]) -> None:
    """Raises LostError."""
    try:
        path.write_bytes(document(suite, cases))
    except OSError as e:
        raise LostError(f"--junit {path}: cannot be written ({e.strerror})") from None


def _clean(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
