"""What the dashboards show: panels as data. `$arm`, `$target`, `$resource` and `$model` are the dashboards' variables.

Each query is over metrics as they are scraped. A panel's series are at one unit; its description says how to read it, and its legend which
line is what without its colour.
"""

from dataclasses import dataclass

ARM = 'arm=~"$arm"'
CALL = 'arm=~"$arm", target=~"$target"'
MODEL = 'model_name=~"$model"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """`queries` are PromQL and legend."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"  # or "stat", "bars"
    stacked: bool = False
    width: int = 12


def quantile(q: float, metric: str, by: str, where: str) -> str:
    """Of a histogram over the last scrapes."""
    return f"histogram_quantile({q}, sum by ({by}, le) (rate({metric}_bucket{{{where}}}{RATE})))"


def quantiles(metric: str, by: str, where: str, legend: str) -> tuple[tuple[str, str], ...]:
    return tuple((quantile(q, metric, by, where), f"{legend} p{q * 100:.0f}") for q in (0.5, 0.9))


def share(part: str, whole: str) -> str:
    return f"({part}) / (({whole}) > 0)"


def rate(metric: str, by: str, where: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}{RATE}))"


def per_query(metric: str) -> str:
    """The mean over all queries so far."""
    return share(f"sum by (arm) ({metric}_sum{{{ARM}}})", f"sum by (arm) ({metric}_count{{{ARM}}})")


def expected(resource: str) -> tuple[str, str]:
    return (f"sum by (arm) (fanmark_expected_{resource}{{{ARM}}})", "{{arm}} expected")


def tokens_per_query(kind: str) -> tuple[str, str]:
    where = f'{ARM}, kind="{kind}"'
    sums = [f"sum by (arm) (fanmark_query_tokens_{end}{{{where}}})" for end in ("sum", "count")]
    return (share(*sums), "{{arm}} measured")


RATIO = "fanmark_amplification_ratio"
OF = f'{ARM}, resource=~"$resource"'

AMPLIFICATION = (
    Panel(
        "Amplification by resource",
        "An arm's mean per query divided by the baseline's, over all queries so far. Absent below 10 queries of either arm.",
        "suffix:x",
        ((f"{RATIO}{{{ARM}}}", "{{arm}} {{resource}}"),),
        kind="bars",
    ),
    Panel(
        "Amplification with its 95 % interval",
        "The ratio so far between the ends of its interval. Times have none while a run goes on: queries meet in the server.",
        "suffix:x",
        (
            (f"{RATIO}{{{OF}}}", "{{arm}} {{resource}}"),
            (f"{RATIO}_low{{{OF}}}", "{{arm}} {{resource}} low"),
            (f"{RATIO}_high{{{OF}}}", "{{arm}} {{resource}} high"),
        ),
    ),
)

EXPECTED = (
    Panel(
        "Calls a query: expected against measured",
        "The closed form of each topology, and what its queries made. The lines of an arm lie on each other, or something is wrong.",
        "none",
        ((per_query("fanmark_query_calls"), "{{arm}} measured"), expected("calls")),
    ),
    Panel(
        "Tool calls a query: expected against measured",
        "As before, for tool calls.",
        "none",
        ((per_query("fanmark_query_tool_calls"), "{{arm}} measured"), expected("tool_calls")),
    ),
    Panel(
        "Input tokens a query: expected against measured",
        "As before, for tokens read, by the server's own count. On a target without /tokenize the closed form is approximate.",
        "none",
        (tokens_per_query("input"), expected("input_tokens")),
    ),
    Panel(
        "Output tokens a query: expected against measured",
        "As before, for tokens written. With natural lengths the closed form is an upper bound.",
        "none",
        (tokens_per_query("output"), expected("output_tokens")),
    ),
    Panel(
        "Queries that differ from their closed form",
        "How many completed queries cost other than their topology says. Any is a defect of the run.",
        "none",
        ((f"sum by (arm) (fanmark_query_mismatches_total{{{ARM}}})", "{{arm}}"),),
        kind="stat",
    ),
    Panel(
        "Cached share of input",
        "Tokens of prompts that the server found in its prefix cache, by its own count. Absent where it does not tell.",
        "percentunit",
        (
            (
                share(
                    rate("fanmark_tokens_total", "arm", f'{ARM}, kind="cached"'),
                    rate("fanmark_tokens_total", "arm", f'{ARM}, kind="input"'),
                ),
                "{{arm}}",
            ),
        ),
    ),
)

SPREAD = (
    Panel(
        "Calls a query: how they are spread",
        "Of queries that ended in the last scrapes, estimated within the histogram's buckets. Far above the median: few queries cost most.",
        "none",
        quantiles("fanmark_query_calls", "arm", ARM, "{{arm}}"),
    ),
    Panel(
        "Tool calls a query: how they are spread",
        "As before, for tool calls.",
        "none",
        quantiles("fanmark_query_tool_calls", "arm", ARM, "{{arm}}"),
    ),
    Panel(
        "Depth of a query: how it is spread",
        "Calls on the longest chain that waited for each other: what no further replica shortens. As before.",
        "none",
        quantiles("fanmark_query_depth", "arm", ARM, "{{arm}}"),
    ),
    Panel(
        "Tokens a query: how they are spread",
        "By kind; cached and fresh are parts of the input. As before.",
        "none",
        quantiles("fanmark_query_tokens", "arm, kind", ARM, "{{arm}} {{kind}}"),
    ),
)

TRAFFIC = (
    Panel(
        "Queries started and completed",
        "Where completed stays below started, the load is more than the server can take.",
        "reqps",
        (
            (rate("fanmark_queries_started_total", "arm", ARM), "{{arm}} started"),
            (rate("fanmark_queries_finished_total", "arm", f'{ARM}, outcome="completed"'), "{{arm}} completed"),
        ),
    ),
    Panel(
        "Queries in flight",
        "Started and not finished.",
        "none",
        ((f"sum by (arm) (fanmark_queries_in_flight{{{ARM}}})", "{{arm}}"),),
    ),
    Panel(
        "Calls in flight",
        "Calls and tool calls that wait for their reply: the fan-out as the servers feel it. Warm-up is included.",
        "none",
        ((f"sum by (arm) (fanmark_calls_in_flight{{{ARM}}})", "{{arm}}"),),
        stacked=True,
    ),
    Panel(
        "Calls by role",
        "Calls that ended a second, by who made them, numbers left out: all debaters are one agent.",
        "reqps",
        ((rate("fanmark_calls_total", "arm, role", CALL), "{{arm}} {{role}}"),),
        stacked=True,
    ),
    Panel(
        "Calls that failed",
        "Of the chosen arms, by class: connect, timeout, http_429, http_4xx, http_5xx, stream_cut, bad_reply, budget, cancelled, untold.",
        "reqps",
        ((rate("fanmark_calls_total", "outcome", f'{CALL}, outcome!="completed"'), "{{outcome}}"),),
    ),
    Panel(
        "Attempts sent again",
        "Calls that the server turned away (429, 503, no connection) and that were sent again. Off unless the scenario asks.",
        "reqps",
        ((rate("fanmark_call_retries_total", "arm", ARM), "{{arm}}"),),
    ),
    Panel(
        "Tokens by kind",
        "Of calls that ended. Input is cached and fresh together; the other kinds are parts of input or output.",
        "suffix: tok/s",
        ((rate("fanmark_tokens_total", "arm, kind", ARM), "{{arm}} {{kind}}"),),
    ),
)

LATENCY = (
    Panel(
        "Query latency",
        "From when the query was due to its final answer, of queries that ended in the last scrapes.",
        "s",
        quantiles("fanmark_query_duration_seconds", "arm", ARM, "{{arm}}"),
    ),
    Panel(
        "Time to first token of a call",
        "From sending to the first token of the reply.",
        "s",
        quantiles("fanmark_call_ttft_seconds", "arm, target", CALL, "{{arm}} {{target}}"),
    ),
    Panel(
        "Call duration",
        "From sending to the last token.",
        "s",
        quantiles("fanmark_call_duration_seconds", "arm, target", CALL, "{{arm}} {{target}}"),
    ),
    Panel(
        "Gaps between chunks",
        "Time between chunks with tokens of one reply; what comes together counts as one.",
        "s",
        quantiles("fanmark_call_itl_seconds", "arm, target", CALL, "{{arm}} {{target}}"),
    ),
)

TOOLS = (
    Panel(
        "Tool calls",
        "That ended a second, by tool.",
        "reqps",
        ((rate("fanmark_tool_calls_total", "arm, tool", ARM), "{{arm}} {{tool}}"),),
        stacked=True,
    ),
    Panel(
        "Tool calls that failed",
        "tool_error is the tool's own answer and goes back into the prompt; transport and protocol errors fail the query.",
        "reqps",
        ((rate("fanmark_tool_calls_total", "tool, outcome", f'{ARM}, outcome!="completed"'), "{{tool}} {{outcome}}"),),
    ),
    Panel(
        "Tool call duration",
        "From sending to the result.",
        "s",
        quantiles("fanmark_tool_call_duration_seconds", "tool", ARM, "{{tool}}"),
    ),
    Panel(
        "Tool results",
        "Bytes that tools gave back: they go into the next prompt.",
        "Bps",
        ((rate("fanmark_tool_result_bytes_total", "arm, tool", ARM), "{{arm}} {{tool}}"),),
    ),
    Panel(
        "Waiting for tools",
        "Mean time in the tool server's queue, where it tells, and of starting a session, where a call had to.",
        "s",
        (
            (
                share(
                    rate("fanmark_tool_queue_seconds_sum", "arm", ARM),
                    rate("fanmark_tool_queue_seconds_count", "arm", ARM) + " + 0.000001",
                ),
                "{{arm}} queue",
            ),
            (
                share(
                    rate("fanmark_tool_session_start_seconds_sum", "arm", ARM),
                    rate("fanmark_tool_session_start_seconds_count", "arm", ARM) + " + 0.000001",
                ),
                "{{arm}} session start",
            ),
        ),
    ),
    Panel(
        "Tool server",
        "What the embedded tool server holds: calls in a slot, calls that wait for one, open sessions.",
        "none",
        (
            ("sum(fanmark_tools_in_flight)", "in flight"),
            ("sum(fanmark_tools_queued)", "queued"),
            ("sum(fanmark_tools_sessions)", "sessions"),
        ),
    ),
)

CLIENT = (
    Panel(
        "Client delays",
        "99th percentile of the event loop's lag and of sending late. Above 5 ms and 5 % of the TTFT the client is strained.",
        "s",
        (
            (quantile(0.99, "fanmark_client_loop_lag_seconds", "instance", ""), "loop lag p99"),
            (quantile(0.99, "fanmark_client_send_delay_seconds", "instance", ""), "send delay p99"),
        ),
    ),
    Panel(
        "Client processors",
        "CPU seconds a second by worker; 1 is a whole core, and no more can be had from a worker.",
        "none",
        ((f"sum by (worker) (rate(fanmark_client_cpu_seconds_total{RATE}))", "worker {{worker}}"),),
    ),
    Panel(
        "Client memory",
        "Largest resident memory so far, by worker.",
        "bytes",
        (("sum by (worker) (fanmark_client_memory_bytes)", "worker {{worker}}"),),
    ),
    Panel(
        "Coalesced chunks",
        "Share of chunks that the client read together with the one before: their gaps are not known.",
        "percentunit",
        (
            (
                share(
                    f"sum(rate(fanmark_client_coalesced_chunks_total{RATE}))",
                    f"sum(rate(fanmark_client_chunks_total{RATE}))",
                ),
                "coalesced",
            ),
        ),
    ),
)

LOAD = (
    Panel(
        "The load: calls in flight by arm",
        "What the client has asked for and waits for, tools included. What follows is what it did to the server.",
        "none",
        ((f"sum by (arm) (fanmark_calls_in_flight{{{ARM}}})", "{{arm}}"),),
        stacked=True,
    ),
    Panel(
        "The load: calls that ended by arm",
        "A second, by arm and target.",
        "reqps",
        ((rate("fanmark_calls_total", "arm, target", CALL), "{{arm}} {{target}}"),),
        stacked=True,
    ),
    Panel(
        "Requests running and waiting",
        "In the batch, and in the server's queue. A queue that grows is load above capacity.",
        "none",
        (
            (f"sum by (model_name) (vllm:num_requests_running{{{MODEL}}})", "{{model_name}} running"),
            (f"sum by (model_name) (vllm:num_requests_waiting{{{MODEL}}})", "{{model_name}} waiting"),
        ),
    ),
    Panel(
        "KV cache in use",
        "Share of KV blocks that hold something a running request needs; at 1 requests are preempted.",
        "percentunit",
        ((f"avg by (model_name) (vllm:kv_cache_usage_perc{{{MODEL}}})", "{{model_name}}"),),
    ),
)

ENGINE = (
    Panel(
        "Tokens in and out",
        "Prompt tokens (cached ones included) and output tokens by the server's own count.",
        "suffix: tok/s",
        (
            (rate("vllm:prompt_tokens_total", "model_name", MODEL), "{{model_name}} prompt"),
            (rate("vllm:prompt_tokens_cached_total", "model_name", MODEL), "{{model_name}} prompt, cached"),
            (rate("vllm:generation_tokens_total", "model_name", MODEL), "{{model_name}} output"),
        ),
    ),
    Panel(
        "Prefix cache hits",
        "Share of looked-up prompt tokens that were found in the prefix cache.",
        "percentunit",
        (
            (
                share(
                    rate("vllm:prefix_cache_hits_total", "model_name", MODEL),
                    rate("vllm:prefix_cache_queries_total", "model_name", MODEL),
                ),
                "{{model_name}}",
            ),
        ),
    ),
    Panel(
        "Time to first token, as the server has it",
        "From arrival to the first token, without the network. Far below the client's figure means a slow way between them.",
        "s",
        quantiles("vllm:time_to_first_token_seconds", "model_name", MODEL, "{{model_name}}"),
    ),
    Panel(
        "Time between tokens, as the server has it",
        "Between output tokens of one request: it grows with the batch.",
        "s",
        quantiles("vllm:inter_token_latency_seconds", "model_name", MODEL, "{{model_name}}"),
    ),
    Panel(
        "Where a request's time goes",
        "Mean seconds of a request in the queue, in prefill and in decode.",
        "s",
        tuple(
            (
                share(
                    rate(f"vllm:request_{part}_time_seconds_sum", "model_name", MODEL),
                    rate(f"vllm:request_{part}_time_seconds_count", "model_name", MODEL),
                ),
                "{{model_name}} " + part,
            )
            for part in ("queue", "prefill", "decode")
        ),
        stacked=True,
    ),
    Panel(
        "Requests that ended, and preemptions",
        "By how they ended. A preempted request loses its KV blocks and begins again.",
        "reqps",
        (
            (rate("vllm:request_success_total", "model_name, finished_reason", MODEL), "{{finished_reason}}"),
            (rate("vllm:num_preemptions_total", "model_name", MODEL), "preempted"),
        ),
    ),
    Panel(
        "Tokens of a step",
        "Mean prompt and output tokens that one step of the engine finished: how well it is filled.",
        "none",
        (
            (
                share(
                    rate("vllm:iteration_tokens_total_sum", "model_name", MODEL),
                    rate("vllm:iteration_tokens_total_count", "model_name", MODEL),
                ),
                "{{model_name}}",
            ),
        ),
    ),
)

RUN = (
    Panel(
        "Run",
        "Scenario, seed and version of the run that is scraped.",
        "none",
        (("fanmark_run_info", "{{scenario}}, seed {{seed}}, run {{run}}, fanmark {{version}}, against {{baseline}}"),),
        kind="stat",
    ),
    Panel(
        "Since the run's start",
        "Seconds since the first query could start, or the whole run's length once it has ended.",
        "s",
        (
            (
                '(max(fanmark_run_mark_timestamp_seconds{mark="end"}) or max(time() + 0 * fanmark_run_info)) - '
                'max(fanmark_run_mark_timestamp_seconds{mark="start"})',
                "seconds",
            ),
        ),
        kind="stat",
    ),
    Panel(
        "Queries by outcome",
        "Of the whole run, warm-up left out. Failures are costs too, and more than 1 % of them censor latencies.",
        "none",
        ((f"sum by (arm, outcome) (fanmark_queries_finished_total{{{ARM}}})", "{{arm}} {{outcome}}"),),
        kind="stat",
    ),
    Panel(
        "Validity",
        "Told at the end: 1 where a tick holds, 0 where it failed; a tick that cannot be known is absent.",
        "none",
        (("sum by (tick) (fanmark_validity)", "{{tick}}"),),
        kind="stat",
    ),
    Panel(
        "Client verdict",
        "1 for the verdict as of now: ok, strained, or client-limited, which makes the run's times the client's own.",
        "none",
        (("sum by (verdict) (fanmark_client_verdict)", "{{verdict}}"),),
    ),
    Panel(
        "Queries in flight by arm",
        "With the marks of the run: its start, when counting begins, its stages, its end.",
        "none",
        ((f"sum by (arm) (fanmark_queries_in_flight{{{ARM}}})", "{{arm}}"),),
    ),
    Panel(
        "Queries done by arm",
        "Completed so far.",
        "none",
        ((f'sum by (arm) (fanmark_queries_finished_total{{{ARM}, outcome="completed"}})', "{{arm}}"),),
    ),
    Panel(
        "Calls that ended, by target",
        "A second, by target and outcome.",
        "reqps",
        ((rate("fanmark_calls_total", "target, outcome", CALL), "{{target}} {{outcome}}"),),
    ),
)
