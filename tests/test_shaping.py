"""Targets: what goes over the wire by their tables, which secrets are read from where, and every mistake in one line that shows none."""

import asyncio
import html
import json
import ssl
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from echo_server import Echo, echoing
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_server import CERTIFICATE

from fanmark.agents import topologies
from fanmark.loadgen import scenario_check
from fanmark.loadgen.errors import FanmarkError, ScenarioError, UnreachableError
from fanmark.loadgen.lanes.http import Sent
from fanmark.loadgen.minimums import check_roles
from fanmark.loadgen.redaction import REDACTED, Secrets
from fanmark.loadgen.scenario import Scenario, Target
from fanmark.loadgen.shaping import Shape, shaped
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.target import HttpEndpoint, connect
from fanmark.loadgen.target_check import is_private

SINGLE = '\n[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n'


def load(text: str) -> Scenario:
    return scenario_check.check(tomllib.loads(text + SINGLE), "f.toml", topologies())


def target(text: str) -> Target:
    return load(f"[target]\n{text}").targets["default"]


def shape(text: str, **environ: str) -> Shape:
    return shaped(target(text), "f.toml: [target]", environ)


URL = 'url = "http://h/v1"\n'


def test_a_key_is_a_bearer_or_stands_bare_in_a_header_of_its_own(tmp_path: Path) -> None:
    assert shape(f'{URL}api_key_env = "K"', K="k3y").headers == {"Authorization": "Bearer k3y"}
    assert shape(f'{URL}api_key_env = "K"\nauth_header = "api-key"', K="k3y").headers == {"api-key": "k3y"}
    (tmp_path / "key").write_text("k3y-of-a-file\n")
    assert shape(f'{URL}api_key_file = "{tmp_path}/key"').headers == {"Authorization": "Bearer k3y-of-a-file"}


def test_values_come_from_the_environment_at_any_depth_of_params() -> None:
    found = shape(
        f'{URL}headers = {{ X-A = {{ env = "A" }}, X-B = "b", env = "plain" }}\n'
        'query = { api-version = "2024-10-21", sig = { env = "A" } }\n'
        'params = { top_k = 3, metadata = { user = { env = "B" } }, tags = ["x", { env = "A" }] }\n'
        'proxy = { env = "P" }\n[target.roles.judge]\nparams = { seed = { env = "B" } }',
        A="a&a",
        B="bb",
        P="http://user:pass@proxy:3128",
    )
    assert found.headers == {"X-A": "a&a", "X-B": "b", "env": "plain"}
    assert found.at("http://h/v1/models") == "http://h/v1/models?api-version=2024-10-21&sig=a%26a"
    assert found.params == {"top_k": 3, "metadata": {"user": "bb"}, "tags": ["x", "a&a"]}
    assert found.role_params == {"judge": {"seed": "bb"}}
    assert found.proxy == "http://user:pass@proxy:3128"
    assert (
        found.secrets.redact("a%26a: bb, to user:pass by pass")
        == ": ".join([REDACTED] * 2) + f", to {REDACTED} by {REDACTED}"
    )


SHAPE_MISTAKES = {
    "a variable that is not set": (
        'headers = { X-A = { env = "NOT_SET" } }',
        '[target] headers.X-A = { env = "NOT_SET" }: the value is missing: set the environment variable NOT_SET',
    ),
    "a variable deep in params": (
        'params = { a = { b = { env = "NOT_SET" } } }',
        '[target] params.a.b = { env = "NOT_SET" }: the value is missing: set the environment variable NOT_SET',
    ),
    "a key that is not set": (
        'api_key_env = "NOT_SET"',
        '[target] api_key_env = "NOT_SET": the API key is missing: set the environment variable NOT_SET',
    ),
    "a key with a line end in it": (
        'api_key_env = "LINES"',
        "[target] the API key: its value (not shown) has a line end, a space around it or a character that no header can "
        "carry: give it in plain ASCII",
    ),
    "a header with a line end in it": (
        'headers = { X-A = { env = "LINES" } }',
        "[target] headers.X-A: its value (not shown) has a line end, a space around it or a character that no header can "
        "carry: give it in plain ASCII",
    ),
    "a file that is not there": (
        'api_key_file = "/no/such/file"',
        '[target] api_key_file = "/no/such/file": cannot be read (No such file or directory): give a file with the API key, '
        "and nothing else",
    ),
    "a file without a key": (
        'api_key_file = "/dev/null"',
        '[target] api_key_file = "/dev/null": is empty: give a file with the API key, and nothing else',
    ),
}


@pytest.mark.parametrize(("text", "told"), SHAPE_MISTAKES.values(), ids=SHAPE_MISTAKES)
def test_a_value_that_cannot_be_had_is_told_with_its_mend(text: str, told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        shape(URL + text, LINES="s3cret\r\nX-Evil: 1")
    assert str(caught.value) == f"f.toml: {told}"


# What is written into [target], and what the user is told after "f.toml: ". No `s3cret` is ever in it.
TARGET_MISTAKES = {
    "an address and several": (
        f'{URL}urls = ["http://a/v1"]',
        '[target]: both url and urls: give url = "http://HOST:PORT/v1", or urls = [...] of the replicas of one service',
    ),
    "one wrong address of several": (
        'urls = ["http://a/v1", "a:80"]',
        '[target] urls = "a:80": must be http://HOST:PORT/v1 or https://...',
    ),
    "a replica twice": (
        'urls = ["http://a/v1", "http://a/v1/"]',
        "[target] urls: an address stands there twice: give each replica once",
    ),
    "a password in the address": (
        'url = "http://user:s3cret@h/v1"',
        '[target] url: a name or password stands in the address (not shown): give headers.Authorization = { env = "NAME" }',
    ),
    "a key in the address": (
        'url = "http://h/v1?key=s3cret"',
        '[target] url = "http://h/v1" with a query string: give it as query = { NAME = ... }',
    ),
    "a password in the proxy": (
        f'{URL}proxy = "http://u:s3cret@p"',
        '[target] proxy: a password stands in it (not shown): put the whole address into the environment: proxy = { env = "NAME" }',
    ),
    "a key in a header": (
        f'{URL}headers = {{ Authorization = "Bearer s3cret" }}',
        '[target] headers.Authorization: a secret stands in the scenario (not shown): give Authorization = { env = "NAME" }',
    ),
    "a key in the params": (
        f'{URL}params = {{ api_key = "s3cret" }}',
        '[target] params.api_key: a secret stands in the scenario (not shown): give api_key = { env = "NAME" }',
    ),
    "a key in the query": (
        f'{URL}query = {{ key = "s3cret" }}',
        '[target] query.key: a secret stands in the scenario (not shown): give key = { env = "NAME" }',
    ),
    "a key in a header of a wrong type": (
        f'{URL}headers = {{ X-Api-Key = "s3cret", a = 1 }}',
        f'[target] headers = {{ X-Api-Key = {REDACTED}, a = 1 }}: must be a table of texts, or of {{ env = "NAME" }}',
    ),
    "a misspelt env": (
        f'{URL}headers = {{ X-A = {{ evn = "A" }} }}',
        "[target.headers]: unknown key 'evn': did you mean 'env'?",
    ),
    "the key in place of its variable": (
        f'{URL}api_key_env = "sk-s3cret"',
        "[target] api_key_env: what is given (not shown) looks like the secret itself: give the name of an environment "
        "variable that holds it",
    ),
    "a value in place of its variable": (
        f'{URL}params = {{ a = [{{ env = "s3crets3crets3crets3cret" }}] }}',
        "[target] params.a: what is given (not shown) looks like the secret itself: give the name of an environment variable "
        "that holds it",
    ),
    "two keys": (
        f'{URL}api_key_env = "A"\napi_key_file = "b"',
        "[target]: both api_key_env and api_key_file: give one of the two",
    ),
    "a key and a header in its place": (
        f'{URL}api_key_env = "A"\nheaders = {{ authorization = {{ env = "B" }} }}',
        "[target]: both an API key and headers.Authorization: give one of the two",
    ),
    "a header that is none": (
        f'{URL}headers = {{ "a b" = "c" }}',
        '[target] headers: "a b" is no header\'s name: use letters, digits and -',
    ),
    "a certificate without https": (
        f'{URL}client_cert = "c.pem"',
        '[target] client_cert with "http://h/v1": it is for https:// only: mend the address, or leave it out',
    ),
    "authorities, and none": (
        'url = "https://h/v1"\nca_file = "c.pem"\ninsecure = true',
        "[target]: both ca_file and insecure = true: give one of the two",
    ),
    "a certificate without its key": (
        'url = "https://h/v1"\nclient_cert = { cert = "c.pem" }',
        "[target.client_cert]: key is missing: it must be a text in quotes",
    ),
    "a way to spread that is not there": (
        'urls = ["http://a/v1"]\nspread = "random"',
        '[target] spread = "random": must be one of "query", "round-robin"',
    ),
}


@pytest.mark.parametrize(("text", "told"), TARGET_MISTAKES.values(), ids=TARGET_MISTAKES)
def test_a_mistake_in_a_target_is_told_with_its_mend(text: str, told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        target(text)
    assert str(caught.value) == f"f.toml: {told}"
    assert "s3cret" not in str(caught.value)


PRIVATE = (
    "localhost localhost. vllm host-1 box.local a.b.internal 127.0.0.1 127.8.8.8 10.1.2.3 172.16.0.1 172.31.255.255 192.168.0.9 "
    "169.254.1.1 100.64.0.1 [::1] [fe80::1] [fd00::1] [::ffff:10.0.0.1]"
)
PUBLIC = (
    "api.openai.com localhost.example.com evil.com 8.8.8.8 172.32.0.1 192.169.0.1 100.128.0.1 [2001:4860:4860::8888] "
    "[::ffff:8.8.8.8] 134744072 0x8.0x8.0x8.0x8 010.8.8.8 xn--bcher-kva.example"
)


def test_which_hosts_are_private_is_told_by_their_names_alone() -> None:
    hosts = [(host, True) for host in PRIVATE.split()] + [(host, False) for host in PUBLIC.split()]
    for host, private in hosts:
        assert (host, is_private(f"https://{host}:8443/v1")) == (host, private)


WRITTEN: dict[str, Callable[[str], str]] = {
    "as it stands": str,
    "in a URL's path": quote,
    "in a URL": lambda text: quote(text, safe=""),
    "in a form": quote_plus,
    "by a client that escapes less": lambda text: quote(text, safe="/?:@!$&'()*,;= "),
    "in JSON": lambda text: json.dumps(text)[1:-1],
    "in JSON in JSON": lambda text: json.dumps(json.dumps(text)[1:-1])[1:-1],
    "in readable JSON": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "in HTML": html.escape,
    "in Python": lambda text: repr(text)[1:-1],
    "in Python's bytes": lambda text: repr(text.encode())[2:-1],
    "in a URL in JSON": lambda text: json.dumps(quote_plus(text))[1:-1],
    "in a URL in a URL": lambda text: quote(quote_plus(text)),
}


@settings(max_examples=25)
@given(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=8, max_size=40),
    st.sampled_from(list(WRITTEN)),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    st.data(),
)
def test_a_secret_is_in_no_text_however_it_is_written(secret: str, way: str, around: str, data: st.DataObject) -> None:
    secrets = Secrets()
    secrets.add(secret)
    form = WRITTEN[way](secret)
    assert secrets.redact(f"{around}{form}!{around}").count(REDACTED) >= 1
    assert secrets.redact(f"a{form}b") == f"a{REDACTED}b" or REDACTED in form
    cut = data.draw(st.integers(0, len(form)))
    left = secrets.redact(f"said: {form[:cut]}")
    shown = left.removeprefix("said: ").replace(REDACTED, "")
    assert (
        len(shown) < len(WRITTEN[way](secret[:6])) + 30
    )  # of what was cut, no more than six characters and half a one


def test_a_short_value_is_taken_out_as_a_word_only() -> None:
    secrets = Secrets()
    secrets.add("max")
    assert secrets.redact("max_tokens to the max, maximal") == f"max_tokens to the {REDACTED}, maximal"
    assert secrets.clean({"max": ["max", 3, None, {"a": ("max",)}]}) == {"max": [REDACTED, 3, None, {"a": [REDACTED]}]}


def ask(endpoint: HttpEndpoint, role: str = "", session: str = "run-arm-0", **more: Any) -> Any:
    body = endpoint.body(
        [], max_tokens=2, forced=False, salt=None, tools=False, samples=1, reasoning_tokens=0, role=role
    )
    return endpoint.send(body | more, {"X-Session-Id": session}, Sent())


def connected(config: Target, use: Any, environ: dict[str, str] | None = None) -> HttpEndpoint:
    async def go() -> HttpEndpoint:
        endpoint = await connect("default", config, time.monotonic, environ or {}, source="f.toml")
        try:
            await use(endpoint)
        finally:
            await endpoint.lane.close()
        return endpoint

    return asyncio.run(go())


@pytest.mark.parametrize("lane", ["fast", "aiohttp", "openai"])
def test_what_goes_over_the_wire(lane: str) -> None:
    async def use(endpoint: HttpEndpoint) -> None:
        for role in ("agent-2", "judge", "judge-1"):
            await ask(endpoint, role)

    with echoing(Echo()) as echo:
        text = (
            f'url = "{echo.url}"\nlane = "{lane}"\n'
            'api_key_env = "K"\nauth_header = "api-key"\nquery = { api-version = "1", sig = { env = "S" } }\n'
            'params = { temperature = 0.5, user = { env = "S" }, min_p = 0.1 }\nheaders = { X-Org = "org" }\n'
            '[target.roles.judge]\nmodel = "lora"\nparams = { temperature = 0.0, reasoning_effort = "high" }'
        )
        connected(target(text), use, {"K": "k3y", "S": "s&s"})
    for call in echo.calls:
        assert call.path == "/v1/chat/completions?api-version=1&sig=s%26s"
        headers = {name.lower(): value for name, value in call.headers.items()}
        assert (headers["api-key"], headers["x-org"], "authorization" in headers) == (
            "k3y",
            "org",
            False,
        )
        assert (call.body["user"], call.body["min_p"]) == ("s&s", 0.1)
    assert [call.body["model"] for call in echo.calls] == ["echo", "lora", "lora"]
    assert [call.body["temperature"] for call in echo.calls] == [0.5, 0.0, 0.0]
    assert [call.body.get("reasoning_effort") for call in echo.calls] == [None, "high", "high"]
    assert all(a.headers["api-key"] == "k3y" for a in echo.asked)
    assert [a.path for a in echo.asked if "models" in a.path] == ["/v1/models?api-version=1&sig=s%26s"]


@pytest.mark.parametrize("spread", ["round-robin", "query"])
def test_replicas_take_calls_in_turn_or_whole_queries(spread: str) -> None:
    async def use(endpoint: HttpEndpoint) -> None:
        for query in (-1, 0, 1, 2, 3):
            for _ in range(2):
                await ask(endpoint, session=f"run-debate-{query}")

    with echoing(Echo()) as a, echoing(Echo()) as b:
        endpoint = connected(target(f'urls = ["{a.url}", "{b.url}"]\nspread = "{spread}"'), use)
    assert endpoint.urls == [a.url, b.url]
    assert [a.path for each in (a, b) for a in each.asked if a.method == "GET"] == ["/v1/models", "/version"] * 2
    taken = [Counter(call.headers["X-Session-Id"] for call in each.calls) for each in (a, b)]
    if spread == "query":
        assert taken == [
            {"run-debate-0": 2, "run-debate-2": 2},
            {"run-debate--1": 2, "run-debate-1": 2, "run-debate-3": 2},
        ]
    else:
        assert taken == [dict.fromkeys((f"run-debate-{query}" for query in (-1, 0, 1, 2, 3)), 1)] * 2


async def _nothing(endpoint: HttpEndpoint) -> None:
    """Connects, and that is all."""


def test_replicas_must_all_have_the_models() -> None:
    with echoing(Echo()) as a, echoing(Echo(models=("other",))) as b:
        for text, told in (
            (f'urls = ["{a.url}", "{b.url}"]', f"{b.url}: has no model 'echo', but other"),
            (f'url = "{a.url}"\nroles.judge.model = "big"', f"{a.url}: has no model 'big', but echo, lora"),
        ):
            with pytest.raises(UnreachableError) as caught:
                connected(target(text), _nothing)
            assert str(caught.value) == told


TLS_MISTAKES = {
    'ca_file = "/no/such.pem"': 'ca_file = "/no/such.pem": cannot be loaded (No such file or directory): give a PEM file',
    'ca_file = "/dev/null"': "give a PEM file",
    'client_cert = "/no/such.pem"': 'client_cert = "/no/such.pem": cannot be loaded (No such file or directory): give a PEM file',
}


@pytest.mark.parametrize("text", TLS_MISTAKES)
def test_a_certificate_that_cannot_be_loaded_is_told(text: str) -> None:
    with pytest.raises(FanmarkError) as caught:
        connected(target(f'url = "https://127.0.0.1:9/v1"\n{text}'), _nothing)
    assert str(caught.value).startswith("f.toml: [target] ") and str(caught.value).endswith(TLS_MISTAKES[text])
    assert "\n" not in str(caught.value)


ROLES = {
    "a role of a target": (
        "roles.jugde.model = 'm'",
        "",
        "[target] roles.jugde: no call has this role: there are agent, agent-1, ",
    ),
    "a role of an arm": (
        "",
        "targets = { jugde = 'default' }",
        "arm 'debate' targets.jugde: no call has this role: there are agent, ",
    ),
    "all there": (
        "roles.judge.model = 'm'\nroles.agent-2.params.a = 1",
        "targets = { judge = 'default', agent = 'default' }",
        "",
    ),
}


@pytest.mark.parametrize(("target", "arm", "told"), ROLES.values(), ids=ROLES)
def test_a_role_that_nobody_has_is_told(target: str, arm: str, told: str) -> None:
    text = f'[target]\nurl = "http://h/v1"\n{target}\n{SINGLE}[[arm]]\nname = "debate"\ntopology = "debate"\n{arm}'
    scenario = scenario_check.check(tomllib.loads(text), "f.toml", topologies())
    if not told:
        return asyncio.run(check_roles(scenario, topologies()))
    with pytest.raises(ScenarioError) as caught:
        asyncio.run(check_roles(scenario, topologies()))
    assert str(caught.value).startswith(f"f.toml: {told}") and "judge" in str(caught.value)
    return None


def test_a_server_that_asks_for_the_clients_certificate() -> None:
    asking = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(CERTIFICATE))
    asking.load_cert_chain(CERTIFICATE)
    asking.verify_mode = ssl.CERT_REQUIRED

    async def use(endpoint: HttpEndpoint) -> None:
        assert endpoint.lane.name == "aiohttp"
        await ask(endpoint)

    both, none = f'client_cert = "{CERTIFICATE}"', "ready_timeout_s = 0.2"
    with echoing(Echo(), asking) as echo:
        url = f'url = "{echo.url}"\n'
        connected(target(f'{url}ca_file = "{CERTIFICATE}"\n{both}'), use)
        apart = f'client_cert = {{ cert = "{CERTIFICATE}", key = "{CERTIFICATE}" }}'
        endpoint = connected(target(f"{url}insecure = true\n{apart}"), use)
        assert endpoint.notes[0] == "default: insecure = true: whose certificate answers is not checked"
        for text in (f'ca_file = "{CERTIFICATE}"\n{none}', f"{both}\n{none}"):  # who are you; who is it
            with pytest.raises(UnreachableError, match="does not answer"):
                connected(target(url + text), use)
    assert len(echo.calls) == 2


def test_a_simulation_takes_a_target_whose_secrets_are_not_there(tmp_path: Path) -> None:
    text = (
        '[target]\nurls = ["http://a/v1", "http://b/v1"]\napi_key_env = "NOT_SET"\nparams = { user = { env = "NOT_SET" } }\n'
        'query = { sig = { env = "NOT_SET" } }\nroles.agent = { model = "lora", params = { top_p = 0.5, api_key = { env = "NOT_SET" } } }\n'
        "[load]\nqueries = 2\n[workload]\nanswer = 3\n"
    )
    found = simulate(load(text), topologies(), Options(tmp_path, "test", [])).summary
    assert found["arms"]["single"]["queries"]["completed"] == 2
    assert found["target"]["url"].startswith("virtual:")
