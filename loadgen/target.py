"""A target found, checked and measured before anything is sent to it; and what one call to it looks like on the wire."""

import asyncio
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import msgspec

from fanmark.loadgen.counters import MetricsOf, Reading
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import CallError, ScenarioError, UnreachableError
from fanmark.loadgen.lanes import fast
from fanmark.loadgen.lanes.http import HttpLane, Sent
from fanmark.loadgen.lanes.sse import Reply
from fanmark.loadgen.prompts import ChatPrompts, TokenPrompts, measure_template
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.tokenizers import LocalTokenizer, RemoteTokenizer, one_token_words
from fanmark.servers.tokenizer import Tokenizer as StubTokenizer
from fanmark.servers.tokenizer import vocabulary

if TYPE_CHECKING:
    from fanmark.loadgen.lanes.openai_sdk import OpenaiLane

AnyLane: TypeAlias = "HttpLane | fast.FastLane | OpenaiLane"


class HttpEndpoint(Endpoint):
    """A target that is reached over HTTP."""

    def __init__(
        self, name: str, config: Target, lane: AnyLane, model: str, server: str, headers: dict[str, str]
    ) -> None:
        super().__init__(name, config, model, server)
        self.max_model_len: int | None = None
        self._lane = lane
        self._headers = {**headers, "Content-Type": "application/json"}
        self._tokenizer: RemoteTokenizer | None = None
        self._metrics = MetricsOf(
            config.metrics_urls or [f"{self.root}/metrics"], self._scrape, guessed=not config.metrics_urls
        )

    @property
    def lane(self) -> AnyLane:
        return self._lane

    async def open_ahead(self, count: int) -> None:
        """Opens connections for `count` calls at a time, where the lane can."""
        if isinstance(self._lane, fast.FastLane):
            await self._lane.open_ahead(self.config.url, count)

    @property
    def root(self) -> str:
        """The server's address without /v1."""
        return self.config.url.rstrip("/").removesuffix("/v1")

    async def measure(self) -> None:
        """Finds out how exactly lengths can be had: template shares and words of one token each, by /tokenize."""
        remote = RemoteTokenizer(self.lane, self.root, self.model, self._headers)
        words = vocabulary()
        try:
            await remote.encode("word")
            self._tokenizer = remote
            if self.server.startswith("fanmark-stub"):
                local = StubTokenizer(words)
                tokenizer: LocalTokenizer | RemoteTokenizer = LocalTokenizer(local)
                ids = {word: i for i, word in enumerate(words)}
            else:
                tokenizer, ids = remote, await one_token_words(remote, words)
            if self.config.api == "completions":
                self.prompts = TokenPrompts(list(ids.values()), tokenizer)
            else:
                self.prompts = ChatPrompts(list(ids), tokenizer, await measure_template(tokenizer))
        except (CallError, ScenarioError) as e:
            if self.config.api == "completions":
                raise ScenarioError(f'{self.config.url}: api = "completions" needs /tokenize: {e}') from None
            self.notes.append(f"{self.name}: input lengths are approximate, and not compared ({e})")

    async def schema_tokens(self, system: bool) -> int | None:
        if self._tokenizer is None or not self.prompts.exact:
            return None
        messages = [{"role": "system", "content": "word"}] * system + [{"role": "user", "content": "word"}]
        bare, full = await asyncio.gather(
            self._tokenizer.count_chat(messages), self._tokenizer.count_chat(messages, self.tools)
        )
        return full - bare

    async def send(self, body: Mapping[str, Any], headers: Mapping[str, str], sent: Sent) -> Reply:
        path = "completions" if self.config.api == "completions" else "chat/completions"
        return await self.lane.send(
            f"{self.config.url.rstrip('/')}/{path}",
            msgspec.json.encode(body),
            {**self._headers, **headers},
            stream=True,
            timeout_s=self.config.call_timeout_s,
            sent=sent,
        )

    async def reading(self, timeout_s: float = 10.0) -> Reading | None:
        return await self._metrics.read(timeout_s)

    async def _scrape(self, url: str, timeout_s: float) -> tuple[int, bytes]:
        """A GET of metrics. The key goes to the target's own address only."""
        own = urlsplit(url)[:2] == urlsplit(self.config.url)[:2]
        return await self.lane.get(url, self._headers if own else {}, timeout_s=timeout_s)


async def connect(
    name: str,
    config: Target,
    now: Callable[[], float],
    environ: Mapping[str, str] = os.environ,
    time_scale: float = 1.0,
) -> HttpEndpoint:
    """Waits for the target, chooses or checks the model and measures its tokenizer. `now` runs `time_scale` times slower than seconds.
    Raises ScenarioError or UnreachableError."""
    headers = dict(config.headers)
    if config.api_key_env is not None:
        key = environ.get(config.api_key_env)
        if not key:
            raise ScenarioError(
                f"{config.url}: the API key is missing: set the environment variable {config.api_key_env}"
            )
        headers["Authorization"] = f"Bearer {key}"
    lane = _lane(config, now, time_scale)
    try:
        status, body = await _models(config, lane, headers)
        if lane.name == "fast" and config.lane == "auto" and 300 <= status < 400:  # sent on elsewhere: aiohttp follows
            await lane.close()
            lane = HttpLane(now, tls=_tls(config), proxy=config.proxy)
            status, body = await _models(config, lane, headers)
        listed = _listed(config, status, body)
        model = _choose(config, [entry["id"] for entry in listed])
        server = await _server(config, lane, headers)
        endpoint = HttpEndpoint(name, config, lane, model, server, headers)
        endpoint.max_model_len = next((entry.get("max_model_len") for entry in listed if entry["id"] == model), None)
        await endpoint.measure()
    except BaseException:
        await lane.close()
        raise
    return endpoint


def _lane(config: Target, now: Callable[[], float], time_scale: float) -> AnyLane:
    """The lane that the target wants."""
    plain = config.url.startswith("http://") and config.proxy is None
    if config.lane == "fast" and not fast.available():
        raise ScenarioError(
            f'{config.url}: lane = "fast" needs epoll, which this system lacks: use "auto" or "aiohttp"'
        )
    if config.lane == "fast" or (config.lane == "auto" and plain and fast.available()):
        return fast.FastLane(now, time_scale=time_scale)
    if config.lane == "openai":
        from fanmark.loadgen.lanes.openai_sdk import OpenaiLane

        return OpenaiLane(now, tls=_tls(config), proxy=config.proxy)
    return HttpLane(now, tls=_tls(config), proxy=config.proxy)


def _tls(config: Target) -> ssl.SSLContext | bool:
    """How https:// is checked."""
    if config.ca_file is None:
        return not config.insecure
    try:
        return ssl.create_default_context(cafile=config.ca_file)
    except OSError as e:
        raise ScenarioError(f"{config.url}: ca_file = {config.ca_file!r}: {e.strerror or e}") from None


async def _models(config: Target, lane: AnyLane, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Status and body of /models, once the target answers."""
    url = f"{config.url.rstrip('/')}/models"
    give_up_at = asyncio.get_running_loop().time() + config.ready_timeout_s
    while True:
        try:
            return await lane.get(url, headers, timeout_s=config.ready_timeout_s)
        except CallError as e:
            if asyncio.get_running_loop().time() + 0.25 > give_up_at:
                raise UnreachableError(
                    f"{config.url}: does not answer within {config.ready_timeout_s:g} s ({e}): is the server up? "
                    "(ready_timeout_s waits longer)"
                ) from None
            await asyncio.sleep(0.25)


def _listed(config: Target, status: int, body: bytes) -> list[dict[str, Any]]:
    url = f"{config.url.rstrip('/')}/models"
    if status in (401, 403):
        hint = (
            f"the key in {config.api_key_env} is refused" if config.api_key_env else "name its variable by api_key_env"
        )
        raise ScenarioError(f"{config.url}: wants an API key (HTTP {status}): {hint}")
    if status != 200:
        if config.model is None:
            raise UnreachableError(f"{url}: HTTP {status}: is the path right (.../v1)? Else name the model by --model")
        return []
    try:
        return list(msgspec.json.decode(body)["data"])
    except (msgspec.DecodeError, KeyError, TypeError):
        raise UnreachableError(f"{url}: not an OpenAI-compatible list of models: is the path right (.../v1)?") from None


def _choose(config: Target, listed: Sequence[str]) -> str:
    if config.model is None:
        if not listed:
            raise UnreachableError(f"{config.url}: lists no model: name one by --model")
        return listed[0]
    if listed and config.model not in listed:
        raise UnreachableError(f"{config.url}: has no model {config.model!r}, but {', '.join(listed[:10])}")
    return config.model


async def _server(config: Target, lane: AnyLane, headers: Mapping[str, str]) -> str:
    root = config.url.rstrip("/").removesuffix("/v1")
    try:
        status, body = await lane.get(f"{root}/version", headers)
        version = msgspec.json.decode(body)["version"] if status == 200 else None
    except (CallError, msgspec.DecodeError, KeyError, TypeError):
        version = None
    if version is None:
        return "unknown"
    return str(version) if str(version).startswith("fanmark-stub") else f"vllm {version}"
