"""Reports to files."""

from collections.abc import Sequence
from pathlib import Path

from fanmark.loadgen.errors import LostError, ScenarioError
from fanmark.loadgen.report import markdown, page
from fanmark.loadgen.report.gather import gather

NAME = "report.html"


def render(folders: Sequence[Path], form: str) -> str:
    """The report of these runs. Raises ScenarioError where a folder holds none."""
    runs = [(str(folder), gather(folder)) for folder in folders]
    try:
        return markdown.report(runs) if form == "md" else page.report(runs)
    except KeyError as e:
        versions = ", ".join(sorted({str(facts.summary["run"]["version"]) for _, facts in runs}))
        raise ScenarioError(
            f"a summary has no {e}: it was made by another version ({versions}), which can report it"
        ) from None


def write(path: Path, text: str) -> None:
    """Raises LostError."""
    try:
        path.write_text(text)
    except OSError as e:
        raise LostError(
            f"{path}: cannot be written ({e.strerror}): fanmark report makes it from the run's folder"
        ) from None


def write_report(folder: Path) -> str:
    """report.html of a run that has ended, in its folder; gives the page."""
    text = render([folder], "html")
    write(folder / NAME, text)
    return text
