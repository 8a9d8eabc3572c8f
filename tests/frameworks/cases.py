"""The frameworks' scripts, and what each must cost a question."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fanmark" / "frameworks"
MODEL = "qwen3-30b-a3b"
PROMPT_CHARS = 200


@dataclass(frozen=True)
class Case:
    """A script, the virtual environment that it runs in, and a question's calls and depth."""

    name: str
    venv: str
    package: str
    calls: int
    depth: int

    def pinned(self) -> str:
        """The framework with its version."""
        lines = (HERE / "requirements" / f"{self.venv}.txt").read_text().splitlines()
        return next(line for line in lines if line.startswith(f"{self.package}=="))

    @property
    def python(self) -> Path:
        return FOLDER / self.venv / "bin" / "python"


CASES = (
    Case("openai_agents_tool", "openai-agents", "openai-agents", calls=3, depth=3),
    Case("openai_agents_handoff", "openai-agents", "openai-agents", calls=2, depth=2),
    Case("langgraph_tool", "langgraph", "langgraph", calls=3, depth=3),
    Case("pydantic_ai_tool", "pydantic-ai", "pydantic-ai-slim", calls=3, depth=3),
    Case("smolagents_managed", "smolagents", "smolagents", calls=3, depth=3),
    Case("autogen_team", "autogen", "autogen-agentchat", calls=4, depth=4),
)


def ask(case: Case, url: str, how: str, when: str) -> None:
    """Run a script to its end, in an empty folder outside the checkout, as openai-agents owns the name `agents`."""
    environment = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_API_KEY")}
    environment |= {"LANGSMITH_TRACING": "false", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    script = HERE / "scripts" / f"{case.name}.py"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(case.python), str(script), url, MODEL, how, when],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, f"{case.name}: {done.stdout}"
