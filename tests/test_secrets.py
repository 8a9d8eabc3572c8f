"""No key, secret header, query value, parameter or proxy password in any output, after every kind of failure.

The server and the proxy say back all that they are told, in each error and in whatever else a client keeps of a reply.
"""

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from echo_server import Echo, echoing

from fanmark.loadgen import cli

SECRETS = {
    "KEY": "sk-live-0123456789abcdefGHIJ/+=",
    "HEADER": 'hdr "quoted" secret\\with & more',
    "QUERY": "query secret+/=?&#%41",
    "PARAM": "param-sécret-ßß-\n-next line",
    "PASSWORD": "pr0xy-p@ss:w/rd-0123",
}
ARM = '[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n[workload]\nanswer = 4\nsystem = 20\nquestion = 20\n'
SHAPE = """
api_key_env = "KEY"
headers = { X-Gateway-Auth = { env = "HEADER" } }
query = { api-version = "1", sig = { env = "QUERY" } }
params = { user = { env = "PARAM" } }
ready_timeout_s = 0.3
"""


def leaks(text: str) -> list[str]:
    """Slices of a secret, however it is written, that stand in a text."""
    found = []
    for secret in SECRETS.values():
        forms = {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
        for form in forms:
            found += [form[i : i + 10] for i in range(len(form) - 9) if form[i : i + 10] in text]
    return found


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    files: dict[str, str]

    @property
    def all(self) -> str:
        return "\n".join([self.out, self.err, *self.files.values()])


class Command:
    """`fanmark`, in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys

    def run(self, target: str, *flags: str) -> Outcome:
        (self.folder / "f.toml").write_text(f"{ARM}[load]\nqueries = 3\nwarmup = 0\nrate = 50\n[target]\n{target}")
        out = self.folder / "run"
        self._monkeypatch.setattr(
            sys, "argv", ["fanmark", "run", str(self.folder / "f.toml"), "--out", str(out), *flags]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = self._capsys.readouterr()
        files = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
        return Outcome(int(ended.value.code or 0), said.out, said.err, files)


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: None
) -> Iterator[Command]:
    yield Command(tmp_path, monkeypatch, capsys)
    asyncio.set_event_loop_policy(None)


CALLS: list[tuple[int | str, str]] = [
    # how a call ends, and the class that it is counted under
    *((status, "http_4xx") for status in (400, 401)),
    (429, "http_429"),
    (500, "http_5xx"),
    ("malformed", "bad_reply"),
    ("error-event", "bad_reply"),
    ("cut", "stream_cut"),
    ("sent-on", "bad_reply"),
    ("finish", ""),
    ("well", ""),
]


@pytest.mark.parametrize("lane", ["fast", "aiohttp", "openai"])
@pytest.mark.parametrize(("ends", "kind"), CALLS)
def test_calls_that_fail_with_the_secrets_said_back(command: Command, lane: str, ends: int | str, kind: str) -> None:
    with echoing(Echo(call=ends)) as echo:
        found = command.run(f'url = "{echo.url}"\nlane = "{lane}"\n{SHAPE}', "--json")
    assert len(echo.calls) >= 3
    assert all(parse_qs(urlsplit(call.path).query)["sig"] == [SECRETS["QUERY"]] for call in echo.calls)
    assert leaks(found.all) == [], found.files["calls.jsonl"].splitlines()[0]
    calls = [json.loads(line) for line in found.files["calls.jsonl"].splitlines()]
    if lane != "fast" and ends == "sent-on":  # it follows, to nowhere
        return
    assert {call["error"] for call in calls} == {kind or None}
    if kind and ends != "cut" and (lane, ends) != ("openai", "malformed"):
        assert all("[redacted]" in call["message"] for call in calls)
    if ends == "finish":
        assert all("[redacted]" in call["finish"] for call in calls)
    assert 'api_key_env = "KEY"' in found.files["scenario.toml"]
    assert 'env = "HEADER"' in found.files["scenario.toml"]


PROXY = "http://user:{}@{{}}".format(quote(SECRETS["PASSWORD"], safe=""))
BEFORE: dict[str, tuple[Echo, str, int, str]] = {
    # what the server does, [target] but for SHAPE, the exit code, and what is said
    "a refused key": (Echo(listed=401), 'url = "{url}"', 2, "the key in KEY is refused"),
    "a server that fails": (Echo(listed=500), 'url = "{url}"', 3, "HTTP 500"),
    "no such model": (
        Echo(models=(f"model-{SECRETS['KEY']}",)),
        'url = "{url}"\nmodel = "m"',
        3,
        "has no model 'm', but ",
    ),
    "nobody listens": (Echo(), 'url = "http://127.0.0.1:9/v1"', 3, "does not answer"),
    "authorities that are not there": (
        Echo(),
        'url = "https://127.0.0.1:9/v1"\nca_file = "/no.pem"',
        2,
        "give a PEM file",
    ),
    "a proxy that refuses": (
        Echo(),
        'url = "https://127.0.0.1:9/v1"\nproxy = {{ env = "PROXY" }}',
        3,
        "does not answer",
    ),
    "a proxy that is not there": (
        Echo(),
        'url = "https://127.0.0.1:9/v1"\nproxy = {{ env = "NOBODY" }}',
        3,
        "does not answer",
    ),
    "a secret in plain": (Echo(), f"url = \"{{url}}\"\nheaders.Authorization = '{SECRETS['KEY']}'", 2, "(not shown)"),
    "a key for a variable": (Echo(), f"url = \"{{url}}\"\napi_key_env = '{SECRETS['KEY']}'", 2, "(not shown)"),
    "a password in plain": (Echo(), f'url = "http://u:{SECRETS["KEY"]}@h/v1"', 2, "(not shown)"),
    "a header that holds a line end": (
        Echo(),
        'url = "{url}"\nheaders.X-Other = {{ env = "PARAM" }}',
        2,
        "(not shown)",
    ),
    "a variable that is not set": (
        Echo(),
        'url = "{url}"\nheaders.X-Other = {{ env = "NOT_SET" }}',
        2,
        "set the environment",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_goes_wrong_before_the_run_says_no_secret(
    command: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo, target, code, said = BEFORE[name]
    shape = SHAPE
    for line in SHAPE.splitlines():  # what the case gives itself
        if line.split(" ")[0] and f"\n{line.split(' ')[0]}" in f"\n{target}".replace("headers.", "headers "):
            shape = shape.replace(line, "")
    with echoing(echo):
        monkeypatch.setenv("PROXY", PROXY.format(echo.url.removeprefix("http://").removesuffix("/v1")))
        monkeypatch.setenv("NOBODY", PROXY.format("127.0.0.1:9"))
        found = command.run(f"{target.format(url=echo.url)}\n{shape}", "--yes")
    assert (found.code, found.out, found.files) == (code, "", {})
    assert said in found.err and found.err.count("\n") == 1, found.err
    assert leaks(found.err) == []


def test_metrics_say_no_secret(command: Command, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}/metrics"
    with echoing(Echo(call=500, scrape=url)) as echo:
        found = command.run(f'url = "{echo.url}"\n{SHAPE}', "--metrics-port", str(unused_tcp_port))
    assert len(echo.scraped) >= 3 and "fanmark_calls_total" in echo.scraped[-1]
    assert leaks("".join(echo.scraped) + found.all) == []


def test_workers_say_no_secret(command: Command) -> None:
    with echoing(Echo(call=401)) as echo:
        found = command.run(f'url = "{echo.url}"\n{SHAPE}', "--workers", "2", "--queries", "30")
    assert found.code == 1 and len(echo.calls) >= 20
    assert leaks(found.all) == []
    assert "HTTP 401" in found.files["calls.jsonl"]


CHAIN = '[[arm]]\nname = "chain"\ntopology = "tool-chain"\ntool_calls = 1\n[tools]\nready_timeout_s = 5\n'
SERVER = 'url = "{url}"\nheaders = {{ X-Gateway-Auth = {{ env = "HEADER" }} }}\napi_key_env = "KEY"\n'


def with_tools(command: Command, target: Echo, tools: Echo, server: str = SERVER, transport: str = "auto") -> Outcome:
    table = server.format(url=tools.url.replace("/v1", "/mcp"))
    text = f'url = "{target.url}"\n{CHAIN}transport = "{transport}"\n[[tools.server]]\n{table}'
    return command.run(text, "--json", "--set", "load.abort_on_errors=false")


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["thin", "sdk"])
@pytest.mark.parametrize(
    ("ends", "error"),
    [
        (401, "tool_transport"),
        (500, "tool_transport"),
        ("rpc-error", "tool_protocol"),
        ("malformed", "tool_protocol"),
        ("tool-error", None),
        ("well", None),
    ],
)
def test_tool_calls_whose_server_says_the_secrets_back(
    command: Command, transport: str, ends: int | str, error: str | None
) -> None:
    """What it says goes into prompts, and the target, which has none of these secrets, says those back in its turn."""
    with echoing(Echo(tool=ends)) as tools, echoing(Echo(call="finish")) as target:
        found = with_tools(command, target, tools, transport=transport)
    assert len(tools.tool_calls) == 3, found.files["calls.jsonl"]
    for asked in tools.asked:
        sent = {name.lower(): value for name, value in asked.headers.items()}
        assert (sent["x-gateway-auth"], sent["authorization"]) == (SECRETS["HEADER"], f"Bearer {SECRETS['KEY']}")
    assert leaks(found.all) == []
    bodies = json.dumps([asked.body for asked in target.asked])
    assert leaks(bodies) == [] and "[redacted]" in bodies
    made = [json.loads(line) for line in found.files["calls.jsonl"].splitlines()]
    made = [call for call in made if call["kind"] == "tool_call"]
    if (transport, ends) != ("sdk", "malformed"):
        assert {call["error"] for call in made} == {error}
    if ends == "rpc-error" or (transport == "thin" and ends in (401, 500)):
        assert all("[redacted]" in call["message"] for call in made)
    assert 'api_key_env = "KEY"' in found.files["scenario.toml"]
    assert 'env = "HEADER"' in found.files["scenario.toml"]


TOOLS_BEFORE: dict[str, tuple[Echo, str, int, str]] = {
    # what the tool server does, its table, the exit code, and what is said
    "a refused key": (Echo(tools_listed=401), SERVER, 3, "the key in KEY is refused"),
    "no key": (Echo(tools_listed=403), 'url = "{url}"', 3, "lets nobody in (HTTP 403: ..."),
    "a key that is not set": (Echo(), SERVER.replace("KEY", "NOT_SET"), 2, "set the environment variable NOT_SET"),
    "a key that is not set, of a command": (
        Echo(),
        'command = ["true"]\nenv.X = {{ env = "NOT_SET" }}',
        2,
        '[[tools.server]] number 1 env.X = { env = "NOT_SET" }: the value is missing',
    ),
    "authorities that are not there": (
        Echo(),
        'url = "https://127.0.0.1:9/mcp"\nca_file = "/no.pem"',
        2,
        "[[tools.server]] number 1 ca_file",
    ),
    "a command that says its environment and ends": (
        Echo(),
        'command = ["sh", "-c", "echo $TOKEN $OTHER >&2; exit 3"]\nenv.TOKEN = {{ env = "KEY" }}\nenv.OTHER = {{ env = "PARAM" }}',
        3,
        "| [redacted] [redacted]",
    ),
    "a secret in plain": (Echo(), f"url = \"{{url}}\"\nheaders.Authorization = '{SECRETS['KEY']}'", 2, "(not shown)"),
    "one of a command": (Echo(), f"command = ['true']\nenv.API_KEY = '{SECRETS['KEY']}'", 2, "(not shown)"),
    "a key for a variable": (Echo(), f"command = ['true']\nenv.X.env = '{SECRETS['KEY']}'", 2, "(not shown)"),
    "a key in the address": (Echo(), f"url = '{{url}}?api_key={SECRETS['KEY']}'", 2, "(not shown), as api_key"),
    "a password in the address": (Echo(), f"url = 'http://u:{SECRETS['KEY']}@h/mcp'", 2, "(not shown)"),
}


@pytest.mark.parametrize(
    ("name", "transport"), [*((name, "auto") for name in TOOLS_BEFORE), ("a refused key", "sdk"), ("no key", "sdk")]
)
def test_tool_servers_that_cannot_be_had_say_no_secret(command: Command, name: str, transport: str) -> None:
    tools, server, code, said = TOOLS_BEFORE[name]
    if transport == "sdk":
        said = said.partition(": ...")[0]
    with echoing(Echo(**{**tools.__dict__, "asked": []})) as tools, echoing(Echo()) as target:
        found = with_tools(command, target, tools, server, transport)
    assert (found.code, found.out, found.files) == (code, "", {}), found.err
    assert said in found.err and found.err.count("\n") == 1, found.err
    assert leaks(found.err) == []
    assert target.calls == [] and tools.tool_calls == []


@pytest.mark.real
def test_a_command_gets_what_its_table_says_of_the_environment_and_no_more(command: Command) -> None:
    """And what it says back in a result goes into no prompt."""
    server = (
        "import json, os, sys\nfor line in sys.stdin:\n"
        + """
    asked = json.loads(line)
    tool = {"name": "env", "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": True}}
    replies = {
        "initialize": {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}},
        "tools/list": {"tools": [tool]},
        "tools/call": {"content": [{"type": "text", "text": json.dumps(dict(os.environ))}]},
    }
    if asked.get("method") in replies:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": replies[asked["method"]]}), flush=True)
    elif "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": {"code": -32601, "message": "no"}}), flush=True)
"""
    )
    (command.folder / "server.py").write_text(server)
    table = f"command = ['{sys.executable}', '{command.folder}/server.py']\nenv = {{ MODE = 'plain', TOKEN = {{ env = 'KEY' }} }}"
    with echoing(Echo(call="finish")) as target:
        found = with_tools(command, target, Echo(), table.replace("{", "{{").replace("}", "}}"))
    said = [message["content"] for call in target.calls for message in call.body["messages"]]
    told = json.loads(next(text for text in said if text.startswith("{")))
    assert (told["MODE"], told["TOKEN"]) == ("plain", "[redacted]")
    assert not set(SECRETS) & set(told), "a variable of the run's own"
    assert "PATH" in told
    assert leaks(found.all) == []


@pytest.fixture
def unused_tcp_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
