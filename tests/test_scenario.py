"""Scenario files and flags: every mistake a user can make gives one line with file, key, value and mend; the rest loads and comes back."""

import tomllib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.agents import topologies
from fanmark.agents.runtime import Topology
from fanmark.loadgen import scenario_check
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.prices import Prices
from fanmark.loadgen.scenario import Scenario, resolved
from fanmark.loadgen.session import _without_none

SINGLE = '[[arm]]\nname = "single"\ntopology = "single"\nbaseline = true\n'
DEBATE = '[[arm]]\nname = "debate"\ntopology = "debate"\n'
TARGET = '[target]\nurl = "http://h:8000/v1"\n'
LENGTH = 'a whole number of at least 0 or a distribution, as { dist = "lognormal", mean = 400, cv = 0.5 }'
DISTS = '"constant", "exponential", "gamma", "lognormal", "uniform"'
ARM_KEYS = (
    "agents, baseline, concurrency, groups, judge, max_calls, max_tokens, mix, name, neighbours, preset, queries, query_seconds, rate, "
    "role_position, rounds, stage_rounds, stagger_s, stop_from, stop_probability, system, target, targets, topology, transcript, "
    "wait_for, warmup, workload"
)


def load(text: str, *assignments: str) -> Scenario:
    raw = tomllib.loads(text)
    scenario_check.override(raw, assignments)
    return scenario_check.check(raw, "f.toml", topologies())


def refusal(text: str, *assignments: str) -> str:
    with pytest.raises(ScenarioError) as caught:
        load(text, *assignments)
    assert caught.value.exit_code == 2
    return str(caught.value)


# What is written above the two arms, and what the user is told.
FILE_MISTAKES = {
    "an unknown key at the top": ('nam = "x"', "f.toml: unknown key 'nam': did you mean 'name'?"),
    "an unknown table": ("[lod]\nrate = 1", "f.toml: unknown key 'lod': did you mean 'load'?"),
    "an unknown key in a table": ("[load]\nrat = 1", "f.toml: [load]: unknown key 'rat': did you mean 'rate'?"),
    "an unknown length": ("[workload]\nanser = 1", "f.toml: [workload]: unknown key 'anser': did you mean 'answer'?"),
    "an unknown key in a distribution": (
        '[workload]\nanswer = { dist = "gamma", mean = 3, sd = 1 }',
        "f.toml: [workload.answer]: unknown key 'sd': allowed are cv, dist, max, mean, min",
    ),
    "an unknown key in prices": (
        f"{TARGET}prices = {{ gpu_day = 2.5 }}",
        "f.toml: [target.prices]: unknown key 'gpu_day': allowed are cached_input, gpu_hour, gpus, input, output",
    ),
    "an unknown key of the one target": (
        '[target]\nurl = "http://h/v1"\nurlz = ["http://h/v1"]',
        "f.toml: [target]: unknown key 'urlz': did you mean 'url'?",
    ),
    "an unknown key of a named target": (
        '[targets.big]\nurl = "http://h/v1"\nmodle = "m"',
        "f.toml: [targets.big]: unknown key 'modle': did you mean 'model'?",
    ),
    "an unknown key of a tool server": (
        '[[tools.server]]\nurl = "http://h/mcp"\n[[tools.server]]\nuri = "x"',
        "f.toml: [[tools.server]] number 2: unknown key 'uri': did you mean 'url'?",
    ),
    "an unknown key of the stub": (
        "[stub]\nport = 1",
        "f.toml: [stub]: unknown key 'port': allowed are api, profile, replicas, router, time_scale, tool_calls",
    ),
    "an unknown key of the objective": (
        "[objective]\nquery_seconds = 1\nshare = 1",
        "f.toml: [objective]: unknown key 'share': allowed are attainment, query_seconds, tpot_s, ttft_s",
    ),
    "a text where a number belongs": (
        '[load]\nrate = "1"',
        'f.toml: [load] rate = "1": must be a number above 0 and of at most 1e+09',
    ),
    "a fraction of a query": (
        "[load]\nqueries = 5.5",
        "f.toml: [load] queries = 5.5: must be a whole number of at least 1",
    ),
    "a truth value as a count": (
        "[load]\nqueries = true",
        "f.toml: [load] queries = true: must be a whole number of at least 1",
    ),
    "a date as a name": ("name = 2020-01-01", "f.toml: name = 2020-01-01: must be a text in quotes"),
    "a text as the seed": ('seed = "7"', 'f.toml: seed = "7": must be a whole number'),
    "a number where a table belongs": ("load = 3", "f.toml: load = 3: must be a table"),
    "targets that are no tables": ("targets = { a = 3 }", "f.toml: targets = { a = 3 }: must be a table"),
    "headers that are no texts": (
        f"{TARGET}headers = {{ a = 1 }}",
        'f.toml: [target] headers = { a = 1 }: must be a table of texts, or of { env = "NAME" }',
    ),
    "a command as one text": (
        '[[tools.server]]\ncommand = "mcp-server-time --utc"',
        'f.toml: [[tools.server]] number 1 command = "mcp-server-time --utc": must be a list of texts, as [...]',
    ),
    "a command with a number in it": (
        '[[tools.server]]\ncommand = ["a", 1]',
        'f.toml: [[tools.server]] number 1 command = ["a", 1]: must be a list of texts, as [...]',
    ),
    "one tool server as a plain table": (
        '[tools]\nserver = { url = "a" }',
        'f.toml: [tools] server = { url = "a" }: must be a list of tables, as [[tools.server]]',
    ),
    "a length in words": ('[workload]\nanswer = "long"', f'f.toml: [workload] answer = "long": must be {LENGTH}'),
    "a length with a fraction": ("[workload]\nanswer = 1.5", f"f.toml: [workload] answer = 1.5: must be {LENGTH}"),
    "a negative length": ("[workload]\nsystem = -1", f"f.toml: [workload] system = -1: must be {LENGTH}"),
    "a negative rate": ("[load]\nrate = -1", "f.toml: [load] rate = -1: must be a number above 0 and of at most 1e+09"),
    "a rate that is no number": (
        "[load]\nrate = nan",
        "f.toml: [load] rate = nan: must be a number above 0 and of at most 1e+09",
    ),
    "an endless rate": (
        "[load]\nrate = inf",
        "f.toml: [load] rate = inf: must be a number above 0 and of at most 1e+09",
    ),
    "a negative latency": (
        "[tools]\nlatency_s = -1",
        'f.toml: [tools] latency_s = -1: must be a number of at least 0 or a distribution, as { dist = "lognormal", '
        "mean = 400, cv = 0.5 }",
    ),
    "a share above 1": (
        "[objective]\nquery_seconds = 3\nattainment = 95",
        "f.toml: [objective] attainment = 95: must be a number above 0 and of at most 1",
    ),
    "a negative count of schemas": (
        "[tools]\nexpose = -1",
        "f.toml: [tools] expose = -1: must be a whole number of at least 0 or a list of texts, as [...]",
    ),
    "the thin client for a command": (
        '[tools]\ntransport = "thin"\n[[tools.server]]\ncommand = ["x"]',
        'f.toml: [tools] transport = "thin": [[tools.server]] number 1 is a command, which the SDK alone can start: use "auto"',
    ),
    "a stub slower than its profile": (
        "[stub]\ntime_scale = 0.5",
        "f.toml: [stub] time_scale = 0.5: must be a number of at least 1",
    ),
    "a wrong mode": ('[load]\nmode = "first"', 'f.toml: [load] mode = "first": must be one of "closed", "open"'),
    "a process that is not there": (
        '[load]\nprocess = "normal"',
        'f.toml: [load] process = "normal": must be one of "constant", "gamma", "poisson", "replay"',
    ),
    "a replay of nothing": (
        '[load]\nprocess = "replay"',
        'f.toml: [load] process = "replay" and arrivals = FILE go together: give both or neither',
    ),
    "a replay of a file that is not there": (
        '[load]\nprocess = "replay"\narrivals = "no.txt"',
        "f.toml: [load] arrivals = 'no.txt': cannot be read ([Errno 2] No such file or directory: 'no.txt'): "
        "give a file with one start time (s) a line",
    ),
    "stages of a closed loop": (
        '[load]\nmode = "closed"\n[[load.stages]]\nseconds = 3\nrate = 1',
        "f.toml: [[load.stages]] set the rate of an open loop: not of a closed one, nor of a replay",
    ),
    "a stage without a rate": (
        "[[load.stages]]\nseconds = 3\nrate = 0",
        "f.toml: [[load.stages]] rate = 0: give a rate above 0, or one to go `to`",
    ),
    "a pilot without rates": (
        '[load]\nmatch = "calls"\nmode = "closed"\nduration = 9',
        'f.toml: [load] match = "calls" sets the rates of an open loop by a pilot: give rate and duration '
        "(not concurrency, queries, stages or a replay)",
    ),
    "a pilot without a window": (
        '[load]\nmatch = "calls"\nqueries = 9',
        'f.toml: [load] match = "calls" sets the rates of an open loop by a pilot: give rate and duration '
        "(not concurrency, queries, stages or a replay)",
    ),
    "a capacity of nobody": (
        '[load]\nmatch = "capacity"',
        'f.toml: [load] match = "capacity": give capacity as the folder of a fanmark sweep, or as queries/s of each arm',
    ),
    "a capacity of another arm": (
        '[load]\nmatch = "capacity"\ncapacity = { other = 2 }',
        "f.toml: [load] match = \"capacity\": the capacity of 'single' is not known, only of other: sweep it, or give it",
    ),
    "a capacity of a closed loop": (
        '[load]\nmatch = "capacity"\nmode = "closed"',
        'f.toml: [load] match = "capacity" sets the rates of an open loop: not of a closed one, a replay or stages',
    ),
    "no repeat at all": ("[load]\nrepeats = 0", "f.toml: [load] repeats = 0: must be a whole number of at least 1"),
    "a lane that is not there": (
        f'{TARGET}lane = "httpx"',
        'f.toml: [target] lane = "httpx": must be one of "aiohttp", "auto", "fast", "openai"',
    ),
    "the fast lane with TLS": (
        '[target]\nurl = "https://h/v1"\nlane = "fast"',
        'f.toml: [target] lane = "fast" with url = "https://h/v1": it carries plain http:// without a proxy: use "auto" or "aiohttp"',
    ),
    "the fast lane by a proxy": (
        f'{TARGET}lane = "fast"\nproxy = "http://p"',
        'f.toml: [target] lane = "fast" with proxy = "http://p": it carries plain http:// without a proxy: use "auto" or "aiohttp"',
    ),
    "metrics of no server": (
        f'{TARGET}metrics_urls = ["h:9090"]',
        'f.toml: [target] metrics_urls: "h:9090": must be http://HOST:PORT/metrics or https://...',
    ),
    "metrics by TLS beside plain calls": (
        f'{TARGET}metrics_urls = ["http://a/metrics", "https://b/metrics"]',
        'f.toml: [target] metrics_urls: "https://b/metrics": the fast lane carries plain http:// only: say lane = "aiohttp"',
    ),
    "a wrong API of a named target": (
        '[targets.big]\nurl = "http://h/v1"\napi = "responses"',
        'f.toml: [targets.big] api = "responses": must be one of "chat", "completions"',
    ),
    "a way to decide that there is not": (
        '[tools]\ndecide = "dice"',
        'f.toml: [tools] decide = "dice": must be one of "model", "script"',
    ),
    "a wrong way to share a cache": (
        '[workload]\ncache = "none"',
        'f.toml: [workload] cache = "none": must be one of "arm", "call", "query", "run", "warm"',
    ),
    "a wrong distribution": (
        '[workload]\nanswer = { dist = "normal", mean = 3 }',
        f'f.toml: [workload.answer] dist = "normal": must be one of {DISTS}',
    ),
    "a distribution without its name": (
        "[workload]\nanswer = { mean = 3 }",
        f"f.toml: [workload.answer]: dist is missing: it must be one of {DISTS}",
    ),
    "a distribution without a mean": (
        '[workload]\nanswer = { dist = "gamma" }',
        "f.toml: [workload.answer]: mean is missing: it must be a number",
    ),
    "a distribution with a negative mean": (
        '[workload]\nanswer = { dist = "gamma", mean = -3 }',
        'f.toml: [workload] answer = { dist = "gamma", mean = -3 }: mean, cv and min must be numbers of at least 0, '
        "cv at most 1000, max at least min",
    ),
    "a distribution without an end": (
        '[workload]\nquestion = { dist = "gamma", mean = inf }',
        'f.toml: [workload] question = { dist = "gamma", mean = inf }: mean, cv and min must be numbers of at least 0, '
        "cv at most 1000, max at least min",
    ),
    "a distribution of latency with max below min": (
        '[tools]\nlatency_s = { dist = "gamma", mean = 1, min = 2, max = 1 }',
        'f.toml: [tools] latency_s = { dist = "gamma", mean = 1, min = 2, max = 1 }: mean, cv and min must be numbers of '
        "at least 0, cv at most 1000, max at least min",
    ),
    "an answer without a token": (
        "[workload]\nanswer = 0",
        "f.toml: [workload] answer = 0: a call writes at least 1 token: give 1 or more",
    ),
    "an answer that may come out empty": (
        '[workload]\naction = { dist = "constant", mean = 3 }',
        'f.toml: [workload] action = { dist = "constant", mean = 3.0, cv = 0.5, min = 0.0, max = inf }: a call writes at '
        "least 1 token: give the distribution min = 1",
    ),
    "both queries and duration": (
        "[load]\nqueries = 5\nduration = 30",
        "f.toml: [load] queries = 5 and duration = 30: give one of the two",
    ),
    "one target and named ones": (
        f'{TARGET}[targets.big]\nurl = "http://h/v1"',
        "f.toml: both [target] and [targets.NAME]: give one target or several named ones",
    ),
    "a target and the stub": (
        f'{TARGET}[stub]\nprofile = "x"',
        "f.toml: both a target and [stub]: the stub stands in only where there is no target",
    ),
    "a target without an address": (
        '[target]\nmodel = "m"',
        'f.toml: [target]: url is missing: give url = "http://HOST:PORT/v1", or urls = [...] of the replicas of one service',
    ),
    "an address without a scheme": (
        '[target]\nurl = "h:8000"',
        'f.toml: [target] url = "h:8000": must be http://HOST:PORT/v1 or https://...',
    ),
    "a wrong address of a named target": (
        '[targets.big]\nurl = "ftp://h"',
        'f.toml: [targets.big] url = "ftp://h": must be http://HOST:PORT/v1 or https://...',
    ),
    "prices that lack one": (
        f"{TARGET}prices = {{ input = 2 }}",
        "f.toml: [target] prices: input without output: give both, in dollars per million tokens",
    ),
    "a meter that is none": (
        f"{TARGET}power_url = 'ipmi://h'",
        'f.toml: [target] power_url = "ipmi://h": give http://HOST:PORT/metrics of a DCGM exporter, or "nvml"',
    ),
    "prices that are none": (
        f"{TARGET}prices = {{ gpus = 2 }}",
        "f.toml: [target] prices: no price is given: give input and output (per million tokens) or gpu_hour",
    ),
    "GPUs without their price": (
        f"{TARGET}prices = {{ input = 1, output = 2, gpus = 2 }}",
        "f.toml: [target] prices: gpus = 2 without gpu_hour: give the dollars of a GPU for an hour",
    ),
    "a negative price": (
        f"{TARGET}prices = {{ input = -2, output = 1 }}",
        "f.toml: [target.prices] input = -2: must be a number of at least 0 and of at most 1e+09",
    ),
    "an objective without a deadline": (
        "[objective]\nattainment = 0.9",
        "f.toml: [objective]: query_seconds is missing: it must be a number above 0 and of at most 1e+09",
    ),
    "a tool server by address and by command": (
        '[[tools.server]]\nurl = "http://h/mcp"\ncommand = ["a"]',
        "f.toml: [[tools.server]] number 1: give either url or command",
    ),
    "a tool server by nothing": ("[[tools.server]]", "f.toml: [[tools.server]] number 1: give either url or command"),
    "several targets, and arms that name none": (
        '[targets.a]\nurl = "http://a/v1"\n[targets.b]\nurl = "http://b/v1"',
        "f.toml: arm 'single': say which target it uses: target = one of a, b, or a default in its targets",
    ),
}


@pytest.mark.parametrize(("text", "told"), FILE_MISTAKES.values(), ids=FILE_MISTAKES)
def test_a_mistake_in_a_table_is_told_with_its_mend(text: str, told: str) -> None:
    assert refusal(f"{text}\n{SINGLE}{DEBATE}") == told


# What is written into the arm "debate", and what the user is told after "f.toml: arm 'debate': ".
ARM_MISTAKES = {
    "an unknown parameter": ("agent = 3", "unknown key 'agent': did you mean 'agents'?"),
    "a key with no likeness": ("zzz = 3", f"unknown key 'zzz': allowed are {ARM_KEYS}"),
    "a wrong choice of a parameter": ('judge = "first"', 'judge = "first": must be one of "all", "last", "none"'),
    "a wrong number of neighbours": ('neighbours = "most"', 'neighbours = "most": must be a whole number or "all"'),
    "a text for a count": ('agents = "4"', 'agents = "4": must be a whole number'),
    "a fraction of an agent": ("agents = 2.5", "agents = 2.5: must be a whole number"),
    "a truth value for a count": ("rounds = true", "rounds = true: must be a whole number"),
    "no agent at all": ("agents = 0", "agents = 0: must be at least 1"),
    "a number of agents that may come out as 0": (
        'agents = { dist = "gamma", mean = 4 }',
        "agents = 0: must be at least 1: give the distribution a larger min",
    ),
    "a count by a wrong distribution": (
        'agents = { dist = "gama", mean = 4 }',
        f'[agents] dist = "gama": must be one of {DISTS}',
    ),
    "a choice by a distribution": (
        'judge = { dist = "gamma", mean = 4 }',
        'judge = { dist = "gamma", mean = 4 }: must be one of "all", "last", "none"',
    ),
    "a wrong rate": ("rate = 0", "rate = 0: must be a number above 0 and of at most 1e+09"),
    "a wrong number of queries": ("queries = 0", "queries = 0: must be a whole number of at least 1"),
    "a wrong warm-up": ("warmup = -1", "warmup = -1: must be a whole number of at least 0"),
    "a baseline in words": ('baseline = "yes"', 'baseline = "yes": must be true or false'),
    "a workload that is no table": ("workload = 3", "workload = 3: must be a table"),
    "an unknown length of its own": (
        "workload = { anser = 3 }",
        "[workload]: unknown key 'anser': did you mean 'answer'?",
    ),
    "a wrong length of its own": ("workload = { answer = -1 }", f"[workload] answer = -1: must be {LENGTH}"),
    "a wrong distribution of its own": (
        'workload = { answer = { dist = "x", mean = 3 } }',
        f'[workload.answer] dist = "x": must be one of {DISTS}',
    ),
    "an empty answer of its own": (
        "workload = { answer = 0 }",
        "[workload] answer = 0: a call writes at least 1 token: give 1 or more",
    ),
}


@pytest.mark.parametrize(("text", "told"), ARM_MISTAKES.values(), ids=ARM_MISTAKES)
def test_a_mistake_in_an_arm_is_told_with_its_mend(text: str, told: str) -> None:
    assert refusal(f"{SINGLE}{DEBATE}{text}") == f"f.toml: arm 'debate': {told}"


ARMS_MISTAKES = {
    "no arm": ('name = "x"', "f.toml: arm is missing: it must be a list of tables, as [[arm]]"),
    "an empty list of arms": (
        "arm = []",
        "f.toml: [[arm]] baseline: no arm has baseline = true: exactly one arm must, usually a single pass",
    ),
    "[arm] for [[arm]]": (
        '[arm]\nname = "x"',
        'f.toml: arm = { name = "x" }: must be a list of tables, as [[arm]]',
    ),
    "an arm that is no table": ("arm = [3]", "f.toml: arm = [3]: must be a list of tables, as [[arm]]"),
    "no baseline": (
        DEBATE,
        "f.toml: [[arm]] baseline: no arm has baseline = true: exactly one arm must, usually a single pass",
    ),
    "two baselines": (
        f"{SINGLE}{DEBATE}baseline = true",
        "f.toml: [[arm]] baseline: single, debate all have baseline = true: exactly one arm must, usually a single pass",
    ),
    "an arm without a name": (
        '[[arm]]\ntopology = "single"',
        "f.toml: arm 1: name is missing: it must be a text in quotes",
    ),
    "two arms of one name": (
        SINGLE + SINGLE,
        "f.toml: [[arm]] name = 'single' is given twice: arms need different names",
    ),
    "a name that is no word": (
        SINGLE.replace('"single"', '"a b"', 1),
        "f.toml: [[arm]] name = 'a b': use letters, digits and . _ + - only",
    ),
    "a target that is not there": (
        f'{TARGET}{SINGLE}target = "big"',
        "f.toml: arm 'single' names the target 'big': there is default",
    ),
    "a role's target that is not there": (
        f'{SINGLE}targets = {{ judge = "big" }}',
        "f.toml: arm 'single' names the target 'big': there is none: the stub stands in",
    ),
}


@pytest.mark.parametrize(("text", "told"), ARMS_MISTAKES.values(), ids=ARMS_MISTAKES)
def test_a_mistake_in_the_list_of_arms_is_told_with_its_mend(text: str, told: str) -> None:
    assert refusal(text) == told


def test_an_unknown_topology_is_told_with_all_that_there_are() -> None:
    known = ", ".join(topologies())
    assert refusal('[[arm]]\nname = "x"\ntopology = "singel"') == (
        f"f.toml: arm 'x': topology = \"singel\": must be one of {known}"
    )
    assert refusal('[[arm]]\nname = "x"') == f"f.toml: arm 'x': topology is missing: it must be one of {known}"


SET_MISTAKES = {
    "no value": ("load.rate", "--set load.rate: must be KEY=VALUE, such as load.rate=2 or arm.debate.agents=6"),
    "no key": ("=3", "--set =3: must be KEY=VALUE, such as load.rate=2 or arm.debate.agents=6"),
    "a hole in the path": ("a..b=3", "--set a..b=3: must be KEY=VALUE, such as load.rate=2 or arm.debate.agents=6"),
    "an unknown arm": ("arm.x.agents=3", "--set arm.x.agents=3: there is no arm 'x', but single, debate"),
    "an arm as a value": ("arm.debate=6", "--set arm.debate=6: arm is not a table"),
    "a path through a value": ("load.mode.x=3", "--set load.mode.x=3: mode is not a table"),
    "an unknown key": ("load.rat=3", "f.toml: [load]: unknown key 'rat': did you mean 'rate'?"),
    "a wrong value": ("seed=abc", 'f.toml: seed = "abc": must be a whole number'),
    "a wrong length of an arm": (
        "arm.debate.workload.anser=9",
        "f.toml: arm 'debate': [workload]: unknown key 'anser': did you mean 'answer'?",
    ),
    "a value in place of all arms": ("arm=3", "f.toml: arm = 3: must be a list of tables, as [[arm]]"),
}


@pytest.mark.parametrize(("setting", "told"), SET_MISTAKES.values(), ids=SET_MISTAKES)
def test_a_mistake_in_set_is_told_with_its_mend(setting: str, told: str) -> None:
    assert refusal(f'[load]\nmode = "open"\n{SINGLE}{DEBATE}', setting) == told


@pytest.mark.parametrize("text", ["arm = 3", "arm = [3]", "[arm]\nx = 1", ""])
def test_set_on_an_arm_where_there_is_none(text: str) -> None:
    assert refusal(text, "arm.x.agents=3") == "--set arm.x.agents=3: there is no arm 'x', but none"


def test_set_takes_toml_or_else_text() -> None:
    text = f"{SINGLE}{DEBATE}"
    assignments = (
        "load.rate=2",
        "load.mode=closed",
        "arm.debate.agents=6",
        "arm.debate.workload.answer=99",
        "name=a#b",
    )
    scenario = load(text, *assignments, 'workload.question={dist="uniform",mean=50}', "objective.query_seconds=3")
    assert (scenario.load.rate, scenario.load.mode, scenario.name) == (2.0, "closed", "a#b")
    assert scenario.arms[1].params == {"agents": 6}
    assert scenario.workload_of(scenario.arms[1]).answer == 99
    assert scenario.workload_of(scenario.arms[0]).answer == 200
    assert scenario.workload.question == Dist("uniform", 50)
    assert scenario.objective is not None and scenario.objective.query_seconds == 3


def test_a_pilot_sets_the_rates_of_all_arms_but_the_baseline() -> None:
    load_ = '[load]\nmatch = "calls"\nduration = 9\n'
    for key, shown in (("rate = 3", "rate = 3"), ("queries = 3", "queries = 3")):
        told = refusal(f"{load_}{SINGLE}{DEBATE}{key}\n")
        assert told.startswith(f"f.toml: arm 'debate': {shown} with [load] match = \"calls\": the pilot sets the rate")
    assert load(f"{load_}{SINGLE}rate = 3\n{DEBATE}").load.match == "calls"


@pytest.mark.parametrize(
    ("assignments", "queries", "duration"),
    [
        (["load.duration=30"], None, 30),  # a duration takes the queries out of force
        (["load.queries=9"], 9, None),
        ([], 5, None),
    ],
)
def test_set_queries_and_duration_clear_one_another(
    assignments: list[str], queries: int | None, duration: float | None
) -> None:
    scenario = load(f"[load]\nqueries = 5\n{SINGLE}", *assignments)
    assert (scenario.load.queries, scenario.load.duration) == (queries, duration)


def test_set_of_both_queries_and_duration_is_refused() -> None:
    told = "f.toml: [load] queries = 9 and duration = 30: give one of the two"
    assert refusal(SINGLE, "load.queries=9", "load.duration=30") == told
    assert refusal(SINGLE, "load.duration=30", "load.queries=9") == told


@dataclass(frozen=True)
class Flags:
    """The load flags of the command line."""

    queries: int | None = None
    duration: float | None = None
    rate: float | None = None
    concurrency: int | None = None
    seed: int | None = None
    max_in_flight: int | None = None


def with_flags(text: str, flags: Flags) -> Scenario:
    raw = tomllib.loads(text)
    scenario_check.override_load(raw, *astuple(flags))
    return scenario_check.check(raw, "f.toml", topologies())


@pytest.mark.parametrize(
    ("flags", "mode", "rate", "concurrency", "queries", "duration", "seed"),
    [
        (Flags(), "closed", 2, 3, 5, None, 7),  # no flag: as it stands in the file
        (Flags(queries=9), "closed", 2, 3, 9, None, 7),
        (Flags(duration=30), "closed", 2, 3, None, 30, 7),  # clears the file's queries, the arm's too
        (Flags(rate=4), "open", 4, 3, 5, None, 7),  # a rate means an open loop
        (Flags(concurrency=8), "closed", 2, 8, 5, None, 7),  # a concurrency a closed one
        (Flags(seed=0), "closed", 2, 3, 5, None, 0),
    ],
)
def test_load_flags_stand_above_the_file(
    flags: Flags, mode: str, rate: float, concurrency: int, queries: int | None, duration: float | None, seed: int
) -> None:
    file = '[load]\nmode = "closed"\nrate = 2\nconcurrency = 3\nqueries = 5\n'
    scenario = with_flags(f"seed = 7\n{file}{SINGLE}", flags)
    found = scenario.load
    assert (found.mode, found.rate, found.concurrency) == (mode, rate, concurrency)
    assert (found.queries, found.duration, scenario.seed) == (queries, duration, seed)


def test_load_flags_stand_above_an_arms_own() -> None:
    arm = f"{SINGLE}queries = 50\nrate = 9\nconcurrency = 2\nwarmup = 1\n"
    flagged = with_flags(arm, Flags(queries=3, rate=1))
    found = flagged.load_of(flagged.arms[0])
    assert (found.queries, found.rate, found.concurrency, found.warmup, found.mode) == (3, 1, 2, 1, "open")
    flagged = with_flags(arm, Flags(duration=30, concurrency=4))
    found = flagged.load_of(flagged.arms[0])
    assert (found.queries, found.duration, found.concurrency, found.mode) == (None, 30, 4, "closed")


def test_a_guard_by_a_flag() -> None:
    assert with_flags(f"[load]\nmax_in_flight = 9\n{SINGLE}", Flags(max_in_flight=2)).load.max_in_flight == 2
    assert with_flags(SINGLE, Flags()).load.max_in_flight is None
    with pytest.raises(
        ScenarioError, match=r"^f.toml: \[load\] max_in_flight = 0: must be a whole number of at least 1"
    ):
        with_flags(SINGLE, Flags(max_in_flight=0))


def test_load_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ScenarioError, match=r"^--queries 3 and --duration 30: give one of the two$"):
        with_flags(SINGLE, Flags(queries=3, duration=30))
    told = r"^--rate 2 and --concurrency 4: a loop is open or closed, give one of the two$"
    with pytest.raises(ScenarioError, match=told):
        with_flags(SINGLE, Flags(rate=2, concurrency=4))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (Flags(queries=0), "f.toml: [load] queries = 0: must be a whole number of at least 1"),
        (Flags(rate=-1), "f.toml: [load] rate = -1: must be a number above 0 and of at most 1e+09"),
        (Flags(concurrency=0), "f.toml: [load] concurrency = 0: must be a whole number of at least 1"),
    ],
)
def test_impossible_values_of_load_flags(flags: Flags, told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        with_flags(SINGLE, flags)
    assert str(caught.value) == told


@pytest.mark.parametrize("text", ["load = 3", "arm = 3", "arm = [3]"])
def test_flags_leave_what_is_no_table_to_be_refused(text: str) -> None:
    with pytest.raises(ScenarioError, match=r"must be a (table|list of tables)"):
        with_flags(text if text.startswith("arm") else f"{text}\n{SINGLE}", Flags(queries=3, seed=1))


def with_target(text: str, environ: dict[str, str] | None = None, **flags: str) -> Scenario:
    raw = tomllib.loads(text)
    given = {"url": None, "model": None, "api": None, "api_key_env": None} | flags
    scenario_check.override_target(raw, given["url"], given["model"], given["api"], given["api_key_env"], environ or {})
    return scenario_check.check(raw, "f.toml", topologies())


def test_target_flag_puts_one_target_in_place_of_all() -> None:
    two = '[targets.a]\nurl = "http://a/v1"\n[targets.b]\nurl = "http://b/v1"\n'
    for text in (two, '[stub]\nprofile = "x"\n', f'{TARGET}model = "old"\napi = "completions"\n', ""):
        scenario = with_target(text + SINGLE, url="http://new/v1", model="m")
        assert list(scenario.targets) == ["default"]
        target = scenario.targets["default"]
        assert (target.url, target.model, target.api, target.api_key_env) == ("http://new/v1", "m", "chat", None)
    keyed = with_target(SINGLE, {"OPENAI_API_KEY": "sk-1"}, url="http://new/v1").targets["default"]
    assert keyed.api_key_env == "OPENAI_API_KEY"  # the name of the variable, never the key


def test_api_flag_goes_to_the_target_or_the_stub() -> None:
    assert with_target(TARGET + SINGLE, api="completions").targets["default"].api == "completions"
    assert with_target(SINGLE, api="completions").stub.api == "completions"


@pytest.mark.parametrize(
    ("text", "flags", "told"),
    [
        ("", {"model": "m"}, "--model m: there is no one target: give --target URL"),
        ("", {"api_key_env": "K"}, "--api-key-env K: there is no one target: give --target URL"),
        (
            '[targets.a]\nurl = "http://a/v1"\n',
            {"api": "chat"},
            "--api chat: there is no one target: give --target URL",
        ),
        ("target = 3\n", {"model": "m"}, "--model m: there is no one target: give --target URL"),
        ("", {"url": "h:1"}, 'f.toml: [target] url = "h:1": must be http://HOST:PORT/v1 or https://...'),
        ("", {"api": "x"}, 'f.toml: [stub] api = "x": must be one of "chat", "completions"'),
    ],
)
def test_mistakes_in_target_flags(text: str, flags: dict[str, str], told: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        with_target(text + SINGLE, {}, **flags)
    assert str(caught.value) == told


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    known = ", ".join(scenario_check.bundled())
    mend = f"give a TOML file or one of the bundled: {known}"
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b'name = "caf\xe9"')
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    for file, told in (
        ("quikstart", f"quikstart: cannot be read (No such file or directory): {mend}"),
        (str(tmp_path), f"{tmp_path}: cannot be read (Is a directory): {mend}"),
        (str(latin), f"{latin}: cannot be read (not UTF-8): {mend}"),
        (str(broken), f"{broken}: is not TOML: Invalid value (at end of document)"),
    ):
        with pytest.raises(ScenarioError) as caught:
            scenario_check.read(file)
        assert str(caught.value) == told


def test_every_bundled_scenario_loads_and_says_what_it_is() -> None:
    bundled = scenario_check.bundled()
    assert "quickstart" in bundled
    for name, text in bundled.items():
        raw, source = scenario_check.read(name)
        scenario = scenario_check.check(raw, source, topologies())
        assert source == name and scenario.name == name and len(text) > 20


# Every key that the documentation names, and the values it gives them as defaults where they differ from another table's.
EVERYTHING = """
name = "debate-or-single"
seed = 7

[target]
url = "http://127.0.0.1:8000/v1"
model = "tiny"
api_key_env = "OPENAI_API_KEY"
api = "chat"
lane = "auto"
params = { temperature = 0.7 }
prices = { input = 0.10, cached_input = 0.01, output = 0.40 }

[workload]
system = 300
question = 200
role = 20
instruction = 40
answer = 200
judge_instruction = 40
judge_answer = 300
action = 60
tool_result = 300
lengths = "forced"
cache = "arm"

[[arm]]
name = "single"
topology = "single"
baseline = true

[[arm]]
name = "debate"
topology = "debate"
agents = 4
rounds = 2
judge = "last"
transcript = "last"
role_position = "tail"
workload = { answer = 200 }

[[arm]]
name = "mcp-chain"
topology = "tool-chain"
tool_calls = 12

[tools]
latency_s = 0.2
expose = 8
decide = "script"
call = ["get_current_time"]
[[tools.server]]
url = "http://127.0.0.1:9000/mcp"

[load]
mode = "open"
rate = 0.5
process = "poisson"
duration = 30
warmup = 2
arms = "interleaved"
repeats = 1

[objective]
query_seconds = 20
attainment = 0.95
"""


def test_the_scenario_of_the_documentation_loads() -> None:
    scenario = load(EVERYTHING)
    assert [arm.name for arm in scenario.arms] == ["single", "debate", "mcp-chain"]
    assert scenario.baseline.name == "single"
    assert scenario.targets["default"].prices == Prices(input=0.1, output=0.4, cached_input=0.01)
    assert scenario.targets["default"].params == {"temperature": 0.7}
    assert (scenario.load.duration, scenario.load.queries) == (30, None)
    assert scenario.tools.server[0].url == "http://127.0.0.1:9000/mcp"
    assert [arm.params for arm in scenario.arms][2] == {"tool_calls": 12}


def test_without_queries_and_duration_there_are_twenty_queries() -> None:
    assert load(SINGLE).load.queries == 20


def test_an_arms_own_load_stands_above_the_common_one() -> None:
    scenario = load(f"[load]\nduration = 30\nrate = 2\n{SINGLE}queries = 7\nrate = 5\n{DEBATE}warmup = 0\n")
    single, debate = (scenario.load_of(arm) for arm in scenario.arms)
    assert (single.queries, single.duration, single.rate, single.warmup) == (7, None, 5, 2)
    assert (debate.queries, debate.duration, debate.rate, debate.warmup) == (None, 30, 2, 0)


lengths = st.integers(1, 10**6) | st.builds(
    lambda dist, mean, cv, least: {"dist": dist, "mean": mean, "cv": cv, "min": least},
    st.sampled_from(["constant", "uniform", "exponential", "lognormal", "gamma"]),
    st.floats(0, 1e6),
    st.floats(0, 10),
    st.integers(1, 50),
)
workloads = st.dictionaries(st.sampled_from(["system", "question", "answer", "action", "chunk"]), lengths)
names = st.text("abcXYZ019_.+-", min_size=1, max_size=8)
texts = st.text(max_size=8)


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    """Scenario tables that are right, with any subset of the keys."""
    arms: list[dict[str, Any]] = [{"name": "base", "topology": "single", "baseline": True}]
    for name in draw(st.lists(names.filter(lambda n: n != "base"), unique=True, max_size=3)):
        params = {"agents": draw(st.integers(1, 9) | lengths), "judge": draw(st.sampled_from(["none", "last", "all"]))}
        arm = {"name": name, "topology": "debate", **params, "workload": draw(workloads)}
        arms.append(
            arm | draw(st.fixed_dictionaries({}, optional={"rate": st.floats(0.1, 9), "queries": st.integers(1, 9)}))
        )
    optional = {
        "name": texts,
        "seed": st.integers(-(2**63), 2**63 - 1),
        "workload": workloads,
        "objective": st.just({"query_seconds": 2.5}),
        "tools": st.fixed_dictionaries({}, optional={"latency_s": st.floats(0, 9) | lengths, "call": st.lists(texts)}),
        "load": st.sampled_from([{}, {"queries": 3}, {"duration": 3.5}, {"mode": "closed", "concurrency": 4}]),
    }
    found = draw(st.fixed_dictionaries({}, optional=optional)) | {"arm": arms}
    target = st.fixed_dictionaries(
        {"url": st.just("http://h/v1")},
        optional={
            "model": texts,
            "prices": st.just({"input": 1, "output": 2}),
            "headers": st.dictionaries(st.from_regex("X-[A-F]{1,9}", fullmatch=True), texts | st.just({"env": "NAME"})),
            "query": st.dictionaries(st.from_regex("[a-f]{1,9}", fullmatch=True), texts | st.just({"env": "NAME"})),
            "params": st.dictionaries(texts, st.integers(0, 9) | texts | st.booleans() | st.floats(0, 1)),
        },
    )
    where = draw(st.sampled_from(["stub", "target", "targets", "nothing"]))
    if where == "stub":
        found["stub"] = {"time_scale": draw(st.floats(1, 9))}
    elif where == "target":
        found["target"] = draw(target)
    elif where == "targets":
        found["targets"] = {"default": draw(target), "big": draw(target)}
        arms[0]["targets"] = {"judge": "big"}
    return found


@settings(max_examples=40)
@given(scenarios())
def test_a_resolved_scenario_reads_back_as_itself(raw: dict[str, Any]) -> None:
    table: dict[str, Topology] = dict(topologies())
    scenario = scenario_check.check(raw, "f.toml", table)
    text = tomli_w.dumps(_without_none(resolved(scenario)))
    again = scenario_check.check(tomllib.loads(text), "f.toml", table)
    assert again == scenario
    assert tomli_w.dumps(_without_none(resolved(again))) == text


def test_a_resolved_scenario_holds_no_key_and_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    text = tomli_w.dumps(_without_none(resolved(load(EVERYTHING))))
    assert "sk-secret" not in text and "f.toml" not in text and "OPENAI_API_KEY" in text


def test_a_scenario_cannot_be_changed() -> None:
    scenario = load(SINGLE)
    with pytest.raises(AttributeError):
        scenario.seed = 3  # type: ignore[misc]
    assert msgspec.structs.replace(scenario, seed=3).seed == 3
