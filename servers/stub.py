"""The stub server as a process: `python -m fanmark.servers.stub --profile qwen3-30b-a3b@h100`.

A real HTTP server that looks like vLLM 0.32, with the engine model inside. When it listens it prints one JSON line,
{"url": ..., "pid": ...}, on standard output. It ends on SIGTERM or SIGINT, and with --parent-pipe when standard input ends.
With --replicas N it is N such processes behind a router (router.py). Exit codes: 0 ended as asked, 2 wrong option, unknown profile, missing
key or port taken (one line on standard error).
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from fanmark.servers.engine.routing import POLICIES, Policy
from fanmark.servers.faults import KINDS, Fault, FaultError, FaultPlan, parse_fault
from fanmark.servers.replica_of import MAX_MODEL_LEN

if TYPE_CHECKING:
    from aiohttp import web

    from fanmark.servers.stub_app import StubApp

DEFAULT_PROFILE = "qwen3-30b-a3b@h100"


class StubError(Exception):
    """The server cannot start; one line for the user."""


@dataclass(frozen=True, slots=True)
class StubOptions:
    """Everything the server can be told; None takes the profile's figure. Flags have the same names, with dashes."""

    profile: str = DEFAULT_PROFILE
    host: str = "127.0.0.1"
    port: int = 0
    model: str | None = None
    max_model_len: int | None = None
    time_scale: float = 1.0
    api_key_env: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    scheduling_policy: Literal["fcfs", "priority"] | None = None
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    prefix_caching: bool = True
    prompt_tokens_details: bool = True
    answer_tokens: float | None = None
    answer_cv: float = 0.0
    reasoning_share: float = 0.5
    auto_tool_calls: int = 1
    scripted_tools: bool = False
    log: str | None = None
    faults: tuple[Fault, ...] = ()
    fault_seed: int = 0
    replicas: int = 1
    router: Policy = "round_robin"
    parent_pipe: bool = False


_HELP = {
    "profile": "MODEL@CHIP, a bundled name or a profile file",
    "host": "address to listen on",
    "port": "port; 0: any free one",
    "model": "name of the served model; default: the profile's model",
    "max_model_len": f"longest context in tokens; default {MAX_MODEL_LEN}, or what the KV cache holds",
    "time_scale": "wall seconds to a second of the engine; above 1 everything is slower",
    "api_key_env": "environment variable that holds the API key; /v1 then asks for it",
    "max_num_seqs": "requests in a batch at most",
    "max_num_batched_tokens": "tokens in a step at most",
    "num_blocks": "KV blocks, the null block included",
    "block_size": "tokens in a KV block",
    "max_num_queued_reqs": "unfinished requests at most; beyond: 503",
    "max_num_queued_tokens": "prompt tokens without a first token at most; beyond: 503",
    "answer_tokens": "mean length of an answer that is not forced; default: max_tokens",
    "answer_cv": "its coefficient of variation (log-normal)",
    "reasoning_share": "share of an answer that is reasoning, where a request asks for reasoning without a length",
    "auto_tool_calls": 'tool calls in a conversation under tool_choice "auto"',
    "log": "file that gets a JSON line for each request that was answered: path, tokens, request id",
    "fault_seed": "seed of the faults",
    "scheduling_policy": "fcfs or priority",
    "replicas": "so many stubs behind a router",
    "router": f"how it chooses: {', '.join(POLICIES)}",
}
_CHOICES: dict[str, Sequence[str]] = {"scheduling_policy": ("fcfs", "priority"), "router": POLICIES}
_KINDS: dict[str, type] = {
    **dict.fromkeys(("time_scale", "answer_tokens", "answer_cv", "reasoning_share"), float),
    **dict.fromkeys(("profile", "host", "model", "api_key_env", "log"), str),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StubError(message)


def parse_options(argv: Sequence[str]) -> StubOptions:
    """The options of a command line. Raises StubError for a wrong one."""
    parser = _Parser(prog="fanmark serve stub", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    for field in fields(StubOptions):
        flag = "--" + field.name.replace("_", "-")
        if field.name in _CHOICES:
            choices = _CHOICES[field.name]
            parser.add_argument(flag, choices=choices, default=field.default, help=_HELP[field.name])
        elif field.name in _HELP:
            parser.add_argument(flag, type=_KINDS.get(field.name, int), default=field.default, help=_HELP[field.name])
    parser.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false")
    parser.add_argument(
        "--scripted-tools",
        action="store_true",
        help="a conversation calls each tool that it is offered once, the last one first, then it answers",
    )
    parser.add_argument(
        "--no-prompt-tokens-details",
        dest="prompt_tokens_details",
        action="store_false",
        help="report no cached tokens in usage, as vLLM without --enable-prompt-tokens-details",
    )
    parser.add_argument(
        "--fault", dest="faults", action="append", default=[], help=f"KIND:key=value,...; kinds: {', '.join(KINDS)}"
    )
    parser.add_argument("--parent-pipe", action="store_true", help="end when standard input ends")
    try:
        given = vars(parser.parse_args(argv))
        given["faults"] = tuple(parse_fault(text) for text in given["faults"])
        return StubOptions(**given)
    except FaultError as error:
        raise StubError(str(error)) from None


def build(options: StubOptions) -> "StubApp":
    """The server's inside, ready to answer; needs a running event loop. Raises StubError for what cannot be."""
    from fanmark.servers.answers import Lengths
    from fanmark.servers.engine.attribution import Accounting
    from fanmark.servers.openai_api import Limits
    from fanmark.servers.profiles.parts import ProfileError
    from fanmark.servers.profiles.profile import load_profile
    from fanmark.servers.realtime import RealTime
    from fanmark.servers.replica_of import replica_of, serving_config
    from fanmark.servers.stub_app import AppOptions, StubApp
    from fanmark.servers.tokenizer import Tokenizer, vocabulary
    from fanmark.servers.vllm_metrics import EngineMetrics, cache_info

    _check(options)
    names: tuple[str, ...] = ("max_num_seqs", "max_num_batched_tokens", "num_blocks", "block_size", "prefix_caching")
    names = (*names, "max_num_queued_reqs", "max_num_queued_tokens")
    overrides: dict[str, Any] = {name: getattr(options, name) for name in names}
    overrides |= {"policy": options.scheduling_policy, "max_model_len": options.max_model_len}
    try:
        profile = load_profile(options.profile)
        config = serving_config(profile, overrides)
        replica_of(profile, config)
    except (ProfileError, ValueError) as error:
        raise StubError(str(error)) from None
    model = options.model or profile.model.id
    kv_bytes = int(profile.model.kv_bytes_per_token * config.block_size * config.num_blocks)
    info = cache_info(config.block_size, config.num_blocks, memory_bytes=kv_bytes, max_model_len=config.max_model_len)
    info["enable_prefix_caching"] = str(config.prefix_caching)
    metrics = EngineMetrics(model, config.max_model_len, info, time.time())
    engine = RealTime(
        lambda: replica_of(profile, config, accounting=Accounting()),
        time_scale=options.time_scale,
        on_late=metrics.lateness.observe,
    )
    app_options = AppOptions(
        Limits(model, config.max_model_len, options.reasoning_share, options.auto_tool_calls, options.scripted_tools),
        Lengths(options.answer_tokens, options.answer_cv),
        api_key=_api_key(options.api_key_env),
        reports_cached=options.prompt_tokens_details,
        profile=profile.name,
        caveats=tuple(profile.caveats()),
    )
    plan = FaultPlan(options.faults, options.fault_seed)
    app = StubApp(app_options, config, engine, metrics, Tokenizer(vocabulary()), plan)
    if options.log is not None:
        try:
            app.log = open(options.log, "a", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise StubError(f"cannot write the log {options.log}: {error.strerror}") from None
    return app


def _check(options: StubOptions) -> None:
    if not options.time_scale > 0:
        raise StubError(f"time_scale = {options.time_scale:g}: give a number above 0")
    if not 0 <= options.reasoning_share < 1:
        raise StubError(f"reasoning_share = {options.reasoning_share:g}: give a number from 0 to below 1")
    if (options.answer_tokens is not None and options.answer_tokens < 1) or options.answer_cv < 0:
        raise StubError("answer_tokens must be at least 1 and answer_cv at least 0")
    if options.auto_tool_calls < 0 or not 0 <= options.port < 65536:
        raise StubError("auto_tool_calls must be at least 0, port between 0 and 65535")
    if options.replicas < 1:
        raise StubError(f"replicas = {options.replicas}: give at least 1")


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise StubError(f"the environment variable {variable} is empty: set it to the API key that clients must send")
    return key


Handler = Callable[["web.BaseRequest"], Awaitable["web.StreamResponse"]]


async def _serve(options: StubOptions) -> None:
    import gc

    app = build(options)
    gc.freeze()  # what start-up made stays: no collection walks it again
    for line in app.options.caveats:
        print(f"note: {line}", file=sys.stderr)
    await answer(app.handle, options, {})


async def answer(handle: Handler, options: StubOptions, told: Mapping[str, Any]) -> None:
    """Listens, says where (and what is `told` beside it), and answers until a signal."""
    import asyncio

    from aiohttp import web

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = web.Server(handle, access_log=None, handler_cancellation=True, keepalive_timeout=600)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, options.host, options.port, backlog=4096).start()
        except OSError as error:
            raise StubError(
                f"cannot listen on {options.host}:{options.port}: {os.strerror(error.errno) if error.errno else error}"
            ) from None
        port = runner.addresses[0][1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(json.dumps({"url": f"http://{host}:{port}", "pid": os.getpid(), **told}), flush=True)
        await ended.wait()
    finally:
        await runner.cleanup()


def serve_stub(options: StubOptions, argv: Sequence[str] = ()) -> int:
    """Serve until a signal or the end of the parent's pipe; returns the exit code, and writes one line on an error. `argv`: the options as
    they were given, for replicas of their own."""
    if options.parent_pipe:
        _end_with_parent()
    try:
        _check(options)
        if options.replicas == 1:
            _run(_serve(options))
        else:
            from fanmark.servers.router import serve

            _run(serve(options, argv))
    except StubError as error:
        print(f"fanmark serve stub: {error}", file=sys.stderr)
        return 2
    return 0


def _run(serving: Coroutine[Any, Any, None]) -> None:
    import asyncio

    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serving)
    except ImportError:
        asyncio.run(serving)


def _end_with_parent() -> None:
    """End this process when standard input does: no orphan survives a parent that was killed."""
    import threading

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    try:
        options = parse_options(given)
    except StubError as error:
        print(f"fanmark serve stub: {error}", file=sys.stderr)
        return 2
    return serve_stub(options, given)


if __name__ == "__main__":
    sys.exit(main())
