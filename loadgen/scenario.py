"""A scenario as typed structures; scenario_check reads one from TOML and holds it against what is possible."""

from typing import Annotated, Any, Literal

import msgspec

from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.prices import Price, Prices
from fanmark.loadgen.questions import CHARS_PER_TOKEN, Question
from fanmark.servers.engine.routing import Policy

Tokens = Annotated[int, msgspec.Meta(ge=0)] | Dist
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A TOML table that refuses unknown keys."""


class FromEnv(Table, frozen=True):
    """A value that is read from the environment when the target is reached, and that no file or message shows."""

    env: str


class ClientCert(Table, frozen=True):
    """The client's certificate and its key, as PEM files."""

    cert: str
    key: str


class RoleShape(Table, frozen=True):
    """What is different for the calls of one role: params on top of the target's, and a model with the target's tokenizer (a LoRA)."""

    params: dict[str, Any] = {}
    model: str | None = None


class Limits(Table, frozen=True):
    """What a target may be sent: calls wait until there is room. A minute is any minute, wherever it begins."""

    requests_per_minute: Annotated[int, msgspec.Meta(ge=1)] | None = None
    tokens_per_minute: Annotated[int, msgspec.Meta(ge=1)] | None = None
    calls_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Budget(Table, frozen=True):
    """The most that a whole run may cost, warm-up included. At the cap no call is sent, and the run ends."""

    dollars: Positive | None = None
    tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    calls: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Target(Table, frozen=True):
    """An inference endpoint. `urls` in place of `url`: replicas of one service, which take calls in turn, or whole queries (`spread`).
    `model` None: the first that /v1/models lists. `params` pass through unchanged, {env = NAME} in them filled in. The key goes as
    "Authorization: Bearer KEY", bare in any other `auth_header`. `lane` "auto": the fast lane for plain http:// without a proxy, on
    systems that have it, else aiohttp; "openai": the SDK that applications use, slow. A call that ends with 429, 503 or no connection is
    sent again at most `retries` times: after the server's Retry-After, else after `retry_backoff_s`, doubled each time. `call_timeout_s`
    is for each attempt. `metrics_urls`: where all its servers tell of themselves; left out: /metrics beside each url. `profile`: the engine
    model that stands in for it in virtual time; left out: the stub's. With one, a target that is never run needs no url.
    `power_url`: where its GPUs' power is told: a DCGM exporter, or "nvml", those of this host."""

    url: str | None = None
    urls: list[str] = []
    spread: Literal["round-robin", "query"] = "round-robin"
    model: str | None = None
    api_key_env: str | None = None
    api_key_file: str | None = None
    auth_header: str = "Authorization"
    api: Literal["chat", "completions"] = "chat"
    lane: Literal["auto", "fast", "aiohttp", "openai"] = "auto"
    params: dict[str, Any] = {}
    metrics_urls: list[str] = []
    headers: dict[str, str | FromEnv] = {}
    query: dict[str, str | FromEnv] = {}
    roles: dict[str, RoleShape] = {}
    ca_file: str | None = None
    client_cert: str | ClientCert | None = None
    insecure: bool = False
    proxy: str | FromEnv | None = None
    ready_timeout_s: Positive = 10.0
    call_timeout_s: Positive = 600.0
    retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    retry_backoff_s: Positive = 0.5
    profile: str | None = None
    prices: Prices | None = None
    power_url: str | None = None
    limits: Limits | None = None

    @property
    def is_reachable(self) -> bool:
        """Whether it has an address; without one it can be simulated only."""
        return self.url is not None or bool(self.urls)

    @property
    def replicas(self) -> list[str]:
        """The addresses that calls go to, one or several."""
        return [url.rstrip("/") for url in self.urls or [self.url or ""]]

    @property
    def metrics_of(self) -> list[str]:
        """Where its servers tell of themselves."""
        return self.metrics_urls or [f"{url.removesuffix('/v1')}/metrics" for url in self.replicas]


class Stub(Table, frozen=True):
    """The embedded stub server, when there is no target: so many `replicas` of it behind a `router`. `tool_calls`: how many its model asks
    for in a conversation, where it decides."""

    profile: str = "qwen3-30b-a3b@h100"
    replicas: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    router: Policy = "round_robin"
    api: Literal["chat", "completions"] = "chat"
    time_scale: Annotated[float, msgspec.Meta(ge=1)] = 1.0
    tool_calls: Count = 1


class Workload(Table, frozen=True):
    """Token lengths by kind of message; 0: no such message. The questions of a `file` are as long as they are."""

    system: Tokens = 300
    question: Tokens = 200
    role: Tokens = 20
    instruction: Tokens = 40
    answer: Tokens = 200
    judge_instruction: Tokens = 40
    judge_answer: Tokens = 300
    action: Tokens = 60
    tool_result: Tokens = 300
    critique: Tokens = 120
    plan: Tokens = 150
    vote: Tokens = 10
    chunk: Tokens = 1000
    turn: Tokens = 100
    compaction_instruction: Tokens = 60
    compaction: Tokens = 1000
    file: str | None = None
    lengths: Literal["forced", "natural"] = "forced"
    cache: Literal["arm", "run", "query", "call", "warm"] = "arm"


KINDS = tuple(f.name for f in msgspec.structs.fields(Workload) if f.name not in ("file", "lengths", "cache"))
ANSWER_KINDS = ("answer", "judge_answer", "action", "critique", "plan", "vote", "turn", "compaction")
RUN_KINDS = ("system", "role")  # drawn once a run, so that all queries share them


OF_URL = ("headers", "api_key_env", "api_key_file", "auth_header", "ca_file", "insecure")  # of a tool server


class ToolServer(Table, frozen=True):
    """A tool server of the user's: by URL (streamable HTTP), with the keys that a target has, or by command (stdio), which has `env` and a
    few harmless variables of ours for its environment."""

    url: str | None = None
    command: list[str] | None = None
    env: dict[str, str | FromEnv] = {}
    headers: dict[str, str | FromEnv] = {}
    api_key_env: str | None = None
    api_key_file: str | None = None
    auth_header: str = "Authorization"
    ca_file: str | None = None
    insecure: bool = False

    @property
    def as_target(self) -> Target:
        """What of it is as a target's, so that the same rules hold."""
        return Target(**{key: getattr(self, key) for key in ("url", *OF_URL)})


class Tools(Table, frozen=True):
    """Where tool calls go. `latency_s` is of the embedded tools; `expose` tools' schemas stand in the prompt: the first so many, or those
    named (None: all). `transport` "auto": a thin client of ours for URLs, the `mcp` SDK for commands. `session`: who has a session and
    connections of its own. `decide` "model": the model's own tool calls run, at most `max_tool_calls` a query. A call waits `reconnect_s`
    for a server that does not listen, and no call is sent again that was sent.
    `round_trip_s` is what a tool call takes on top in virtual time (MCP, HTTP and the client); its default is what the embedded server
    took on a 2-core virtual machine, one call at a time: 2 ms."""

    latency_s: Annotated[float, msgspec.Meta(ge=0)] | Dist = 0.2
    dollars_per_call: Price | None = None
    round_trip_s: Annotated[float, msgspec.Meta(ge=0)] = 0.002
    expose: Count | list[str] | None = None
    transport: Literal["auto", "thin", "sdk"] = "auto"
    session: Literal["per_agent", "per_query", "shared"] = "shared"
    decide: Literal["script", "model"] = "script"
    max_tool_calls: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 32
    call: list[str] = []
    server: list[ToolServer] = []
    call_timeout_s: Positive = 120.0
    ready_timeout_s: Positive = 30.0
    reconnect_s: NotNegative = 10.0


class Stage(Table, frozen=True):
    """So many seconds at `rate` queries per second, or going evenly from `rate` to `to`."""

    seconds: Positive
    rate: NotNegative
    to: NotNegative | None = None


class Load(Table, frozen=True):
    """When queries start. Each of rate, concurrency, queries and warmup is per arm. `stages` stand in place of `rate`; `gap_cv` is of the
    gamma process; `arrivals` are start times, or the file that they are read from; left out in a replay, queries start as recorded, and
    `speed` times as fast. At most `max_in_flight` queries run at a time: what
    that delays is told apart. A query that takes longer than `query_timeout_s` is given up. The run ends when so large a share of the last
    20 calls failed as `abort_on_errors` says (false: never). All is done `repeats` times.
    With `match` "calls" a pilot sets the arms' rates so that all have as many calls in flight as the baseline at its rate; with "capacity"
    each arm's rate is this `fraction` of its own `capacity`, in place of `rate`: queries/s by arm, or a sweep's folder. `users` is the
    `concurrency` of a closed loop whose queries are the turns of sessions: so many `turns` each, and `think_s` between two queries of a
    user; an arm's own `concurrency` is then its users."""

    mode: Literal["open", "closed"] = "open"
    rate: Positive = 0.5
    stages: list[Stage] = []
    process: Literal["constant", "poisson", "gamma", "replay"] = "poisson"
    gap_cv: Positive = 2.0
    arrivals: str | list[NotNegative] | None = None
    speed: Positive = 1.0
    max_in_flight: Annotated[int, msgspec.Meta(ge=1)] | None = None
    query_timeout_s: Positive | None = None
    abort_on_errors: bool | Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 1
    users: Annotated[int, msgspec.Meta(ge=1)] | None = None
    turns: Annotated[int, msgspec.Meta(ge=1)] | Dist = 1
    think_s: NotNegative | Dist = 0.0
    queries: Annotated[int, msgspec.Meta(ge=1)] | None = None
    duration: Positive | None = None
    warmup: Count = 2
    arms: Literal["interleaved", "apart"] = "interleaved"
    match: Literal["queries", "calls", "capacity"] = "queries"
    capacity: str | dict[str, Positive] | None = None
    fraction: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.7
    repeats: Annotated[int, msgspec.Meta(ge=1)] = 1


class Objective(Table, frozen=True):
    """A deadline on the final answer, and the share of started queries that must meet it. `ttft_s` and `tpot_s` are an objective of its own
    beside it, on calls: a query meets it when all calls that it needed had their first token, and on average each further one, so soon."""

    query_seconds: Positive
    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    attainment: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95


class Threshold(Table, frozen=True):
    """A limit on a figure of summary.json, an arm's by its name: "debate.per_query.latency_s.p90". With `abort` the run ends once
    the figure so far is beyond it."""

    metric: str
    below: float | None = None
    above: float | None = None
    abort: bool = False


class Arm(Table, frozen=True):
    """One topology with its parameters, as one competitor. `params` holds the topology's own keys as written, and those of the `preset`.
    A query that has made `max_calls` calls, or has read and written `max_tokens` tokens, starts no further call and ends with what it has,
    as does one that has run for `query_seconds`. No two calls of a query leave less than `stagger_s` apart. With `mix` (topology "mix")
    each query is one of the arm's parts, drawn by `weight` from the query's seed."""

    name: str
    topology: str
    preset: str | None = None
    baseline: bool = False
    target: str | None = None
    targets: dict[str, str] = {}
    workload: dict[str, Any] = {}
    rate: Positive | None = None
    concurrency: Annotated[int, msgspec.Meta(ge=1)] | None = None
    queries: Annotated[int, msgspec.Meta(ge=1)] | None = None
    warmup: Count | None = None
    max_calls: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    query_seconds: Positive | None = None
    stagger_s: NotNegative = 0.0
    weight: NotNegative = 1.0
    mix: list["Arm"] = []
    params: dict[str, Any] = {}


QUESTIONS = "questions.jsonl"  # the workload's file in a run's folder
PART_KEYS = frozenset({"name", "weight", "topology", "preset", "workload"})  # of a part of a mix, beside its topology's
ARM_KEYS = frozenset(field.name for field in msgspec.structs.fields(Arm)) - {"params"}


class Scenario(Table, frozen=True):
    """A checked scenario. `targets` is empty when the embedded stub stands in; `questions` are those of the workload's file. `record`: the
    run's folder is also a recording (recording.py). `tapped`: its arms are what passed a tap, and are not set against each other."""

    name: str
    seed: int
    targets: dict[str, Target]
    stub: Stub
    workload: Workload
    arms: list[Arm]
    tools: Tools
    load: Load
    objective: Objective | None
    budget: Budget | None
    source: str
    threshold: list[Threshold] = []
    questions: list[Question] = []
    record: bool = False
    tapped: bool = False

    @property
    def system_message(self) -> bool:
        """Whether prompts begin with a system message that all agents share."""
        return self.workload.system != 0 or (bool(self.questions) and self.questions[0].system is not None)

    def workload_of(self, arm: Arm) -> Workload:
        """The workload with the arm's own lengths."""
        if not arm.workload:
            return self.workload
        return msgspec.convert(msgspec.to_builtins(self.workload) | arm.workload, Workload)

    def load_of(self, arm: Arm) -> Load:
        """The load with the arm's own rate, concurrency, queries and warmup; giving `queries` clears `duration`."""
        own = {k: v for k in ("rate", "concurrency", "queries", "warmup") if (v := getattr(arm, k)) is not None}
        if "queries" in own:
            own["duration"] = None
        if self.load.match == "capacity" and isinstance(self.load.capacity, dict):
            own["rate"] = self.load.fraction * self.load.capacity[arm.name]
        return msgspec.structs.replace(self.load, **own)

    def unlike_baseline(self) -> list[str]:
        """A line for each arm that is asked other questions than the baseline."""
        base, found = self.workload_of(self.baseline), list[str]()
        for arm in self.arms:
            own = self.workload_of(arm)
            kinds = [kind for kind in ("system", "question") if getattr(own, kind) != getattr(base, kind)]
            if kinds:
                found.append(
                    f"{arm.name}: its {' and '.join(kinds)} lengths are not the baseline's: ratios compare other questions too"
                )
        return found

    def approximate(self) -> list[str]:
        """A line for each thing that a plan without a target only knows about."""
        found = []
        if self.questions:
            found.append(
                f"{len(self.questions)} questions of a file: {CHARS_PER_TOKEN:g} characters are taken for a token"
            )
        if self.workload.lengths == "natural":
            found.append('lengths = "natural": output tokens are at most so many, and so is what is read of them again')
        return found

    @property
    def prices(self) -> dict[str, Prices | None]:
        """By target; the embedded stub has none."""
        return {name: target.prices for name, target in self.targets.items()}

    @property
    def baseline(self) -> Arm:
        """The arm that all others are set against."""
        return next(arm for arm in self.arms if arm.baseline)


def resolved(scenario: Scenario) -> dict[str, Any]:
    """The scenario as a table that, written as TOML, repeats the run. Keys come from the environment and are not in it."""
    table: dict[str, Any] = msgspec.to_builtins(scenario)
    arms = [_flat(arm) for arm in table.pop("arms")]
    del table["source"]
    if table.pop("questions"):
        table["workload"]["file"] = QUESTIONS
    if table["targets"]:
        del table["stub"]
    return table | {"arm": arms}


def _flat(arm: dict[str, Any]) -> dict[str, Any]:
    """An arm as it is written: the topology's keys beside the others."""
    kept: dict[str, Any] = {k: v for k, v in arm.items() if k not in ("params", "mix", "weight")} | arm["params"]
    if not arm["mix"]:
        return kept
    parts = [{k: v for k, v in part.items() if k in PART_KEYS} | part["params"] for part in arm["mix"]]
    return {k: v for k, v in kept.items() if k != "topology"} | {"mix": parts}
