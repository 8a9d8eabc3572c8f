"""A target found, checked and measured before anything is sent to it; and what one call to it looks like on the wire."""

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import msgspec

from fanmark.loadgen.counters import MetricsOf, Reading
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import CallError, FanmarkError, ScenarioError, UnreachableError
from fanmark.loadgen.lanes import fast
from fanmark.loadgen.lanes.http import HttpLane, Sent
from fanmark.loadgen.lanes.sse import Reply
from fanmark.loadgen.power import NVML, nvml, parse_dcgm
from fanmark.loadgen.prompts import ChatPrompts, TokenPrompts, measure_prose, measure_template
from fanmark.loadgen.redaction import RedactedLane
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.shaping import Shape, key_hint, own_tls, shaped, target_key
from fanmark.loadgen.tokenizers import LocalTokenizer, RemoteTokenizer, one_token_words
from fanmark.servers.tokenizer import Tokenizer as StubTokenizer
from fanmark.servers.tokenizer import vocabulary

if TYPE_CHECKING:
    import httpx2

    from fanmark.loadgen.lanes.openai_sdk import OpenaiLane

AnyLane: TypeAlias = "HttpLane | fast.FastLane | OpenaiLane"


class HttpEndpoint(Endpoint):
    """A target that is reached over HTTP."""

    def __init__(
        self, name: str, config: Target, lane: AnyLane, shape: Shape, model: str = "", server: str = "unknown"
    ) -> None:
        super().__init__(name, config, model, server)
        self.params, self.role_params = shape.params, shape.role_params
        self.shape = shape
        self._carrier = lane
        self._lane: AnyLane | RedactedLane = RedactedLane(lane, shape.secrets) if shape.secrets else lane
        self.headers = {**shape.headers, "Content-Type": "application/json"}
        self._tokenizer: RemoteTokenizer | None = None
        self._metrics = MetricsOf(
            config.metrics_of,
            self._scrape,
            guessed=not config.metrics_urls,
        )
        path = "/completions" if config.api == "completions" else "/chat/completions"
        self._calls_to = [shape.at(f"{url}{path}") for url in config.replicas]
        self._turn = itertools.count()
        self._nvml = nvml() if config.power_url == NVML else None
        self._pool: httpx2.AsyncHTTPTransport | None = None

    @property
    def lane(self) -> "AnyLane | RedactedLane":
        """What carries this target's requests; no error of it shows a secret."""
        return self._lane

    async def open_ahead(self, count: int) -> None:
        """Opens connections for `count` calls at a time, where the lane can."""
        if isinstance(self._carrier, fast.FastLane):
            for url in self.urls:
                await self._carrier.open_ahead(url, -(-count // len(self.urls)))

    @property
    def urls(self) -> list[str]:
        """The addresses of its replicas, .../v1."""
        return self.config.replicas

    @property
    def root(self) -> str:
        """The first server's address without /v1."""
        return self.urls[0].removesuffix("/v1")

    def replica(self, session: str) -> int:
        """Which replica takes the next call of this query: calls in turn, or all of query i to replica i mod n, in every arm."""
        if self.config.spread == "query":
            return int(session.rpartition("-")[2] or 0) % len(self.urls)
        return next(self._turn) % len(self.urls)

    def sdk_pool(self) -> "httpx2.AsyncHTTPTransport":
        """What carries the requests of an agent's own client, as they are."""
        import httpx2

        if self._pool is None:
            limits = httpx2.Limits(keepalive_expiry=60)
            tls = own_tls(self.config, target_key(self.name))
            self._pool = httpx2.AsyncHTTPTransport(verify=tls, proxy=self.shape.proxy, trust_env=False, limits=limits)
        return self._pool

    def at(self, path: str, session: str) -> str:
        """Where such a request goes."""
        return self.shape.at(f"{self.urls[self.replica(session) if len(self.urls) > 1 else 0]}{path}")

    async def close(self) -> None:
        """Closes all connections."""
        if self._pool is not None:
            await self._pool.aclose()
        await self.lane.close()

    async def measure(self) -> None:
        """Finds out how exactly lengths can be had: template shares and words of one token each, by /tokenize."""
        remote = RemoteTokenizer(self.lane, self.root, self.model, self.headers)
        words = vocabulary()
        count_part: Callable[[str], int] | None = None
        try:
            await remote.encode("word")
            self._tokenizer = remote
            if self.server.startswith("fanmark-stub"):
                local = StubTokenizer(words)
                tokenizer: LocalTokenizer | RemoteTokenizer = LocalTokenizer(local)
                count_part = local.count
                ids = {word: i for i, word in enumerate(words)}
            else:
                tokenizer, ids = remote, await one_token_words(remote, words)
            chars = await measure_prose(tokenizer)
            if self.config.api == "completions":
                self.prompts = TokenPrompts(list(ids.values()), tokenizer, chars)
            else:
                template = await measure_template(tokenizer)
                self.prompts = ChatPrompts(list(ids), tokenizer, template, chars, count_part)
        except (CallError, ScenarioError) as e:
            if self.config.api == "completions":
                raise ScenarioError(f'{self.urls[0]}: api = "completions" needs /tokenize: {e}') from None
            self.notes.append(f"{self.name}: input lengths are approximate, and not compared ({e})")

    async def schema_tokens(self, system: bool) -> int | None:
        if self._tokenizer is None or not self.prompts.exact:
            return None
        messages = [{"role": "system", "content": "word"}] * system + [{"role": "user", "content": "word"}]
        bare, full = await asyncio.gather(
            self._tokenizer.count_chat(messages), self._tokenizer.count_chat(messages, self.tools)
        )
        return full - bare

    def send(self, body: Mapping[str, Any], headers: Mapping[str, str], sent: Sent) -> Awaitable[Reply]:
        return self._lane.send(
            self._calls_to[self.replica(headers["X-Session-Id"]) if len(self._calls_to) > 1 else 0],
            msgspec.json.encode(body),
            {**self.headers, **headers},
            stream=True,
            timeout_s=self.config.call_timeout_s,
            sent=sent,
        )

    @property
    def metrics_urls(self) -> tuple[str, ...]:
        return tuple(self._metrics.urls)

    async def reading(self, timeout_s: float = 10.0) -> Reading | None:
        return await self._metrics.read(timeout_s)

    async def power(self, timeout_s: float = 10.0) -> Mapping[str, float]:
        if self._nvml is not None:
            return self._nvml()
        if self.config.power_url is None:
            return {}
        try:
            status, body = await self.lane.get(self.config.power_url, {}, timeout_s=timeout_s)
        except CallError:
            return {}
        return parse_dcgm(body.decode(errors="replace")) if status == 200 else {}

    def note_silent(self) -> None:
        """Notes which of the addresses that were given for its counters did not tell any when they were last read."""
        if self.config.metrics_urls and self._metrics.silent:
            urls = ", ".join(self._metrics.silent)
            self.notes.append(f"{self.name}: metrics_urls: no counters at {urls}: the servers' counts are unknown")

    async def _scrape(self, url: str, timeout_s: float) -> tuple[int, bytes]:
        """A GET of metrics. The key goes to the target's own addresses only."""
        own = urlsplit(url)[:2] in [urlsplit(address)[:2] for address in self.urls]
        return await self.lane.get(url, self.headers if own else {}, timeout_s=timeout_s)


async def connect(
    name: str,
    config: Target,
    now: Callable[[], float],
    environ: Mapping[str, str] = os.environ,
    time_scale: float = 1.0,
    source: str = "",
    wall: Callable[[], float] = time.time,
) -> HttpEndpoint:
    """Waits for the target, chooses or checks the model and measures its tokenizer. `now` runs `time_scale` times slower than seconds;
    `source` is the scenario's file, `wall` the clock that the kernel stamps with. Raises ScenarioError or UnreachableError, which show
    no secret."""
    where = f"{source}: {target_key(name)}" if source else target_key(name)
    shape = shaped(config, where, environ)
    lane = _lane(config, where, shape, now, time_scale, wall)
    try:
        endpoint = HttpEndpoint(name, config, lane, shape)
        answers = await _models(endpoint)
        if lane.name == "fast" and config.lane == "auto" and any(300 <= status < 400 for status, _ in answers):
            await lane.close()
            lane = HttpLane(now, tls=own_tls(config, where), proxy=shape.proxy)  # sent on elsewhere: aiohttp follows
            endpoint = HttpEndpoint(name, config, lane, shape)
            answers = await _models(endpoint)
        listed = [_listed(config, url, *answer) for url, answer in zip(endpoint.urls, answers, strict=True)]
        endpoint.model, endpoint.max_model_len = _model(endpoint, listed)
        endpoint.server = await _server(endpoint)
        if config.insecure:
            endpoint.notes.append(f"{name}: insecure = true: whose certificate answers is not checked")
        await endpoint.measure()
    except FanmarkError as e:
        await lane.close()
        e.args = (shape.secrets.redact(str(e)),)
        raise
    except BaseException:
        await lane.close()
        raise
    return endpoint


def _lane(
    config: Target,
    where: str,
    shape: Shape,
    now: Callable[[], float],
    time_scale: float,
    wall: Callable[[], float],
) -> AnyLane:
    """The lane that the target wants."""
    plain = config.proxy is None and all(url.startswith("http://") for url in config.replicas)
    if config.lane == "fast" and not fast.available():
        raise ScenarioError(f'{where} lane = "fast": it needs epoll, which this system lacks: use "auto" or "aiohttp"')
    if config.lane == "fast" or (config.lane == "auto" and plain and fast.available()):
        return fast.FastLane(now, time_scale=time_scale, wall=wall)
    if config.lane == "openai":
        from fanmark.loadgen.lanes.openai_sdk import OpenaiLane

        return OpenaiLane(now, tls=own_tls(config, where), proxy=shape.proxy)
    return HttpLane(now, tls=own_tls(config, where), proxy=shape.proxy)


async def _models(endpoint: HttpEndpoint) -> list[tuple[int, bytes]]:
    """Status and body of each replica's /models, once it answers."""
    return list(await asyncio.gather(*(_models_of(endpoint, url) for url in endpoint.urls)))


async def _models_of(endpoint: HttpEndpoint, url: str) -> tuple[int, bytes]:
    ready_s = endpoint.config.ready_timeout_s
    give_up_at = asyncio.get_running_loop().time() + ready_s
    while True:
        try:
            return await endpoint.lane.get(
                endpoint.shape.at(f"{url}/models"), endpoint.shape.headers, timeout_s=ready_s
            )
        except CallError as e:
            if asyncio.get_running_loop().time() + 0.25 > give_up_at:
                raise UnreachableError(
                    f"{url}: does not answer within {ready_s:g} s ({e}): is the server up? (ready_timeout_s waits longer)"
                ) from None
            await asyncio.sleep(0.25)


def _listed(config: Target, url: str, status: int, body: bytes) -> list[dict[str, Any]]:
    if status in (401, 403):
        raise ScenarioError(f"{url}: wants an API key (HTTP {status}): {key_hint(config)}")
    if status == 407:
        raise UnreachableError(
            f"{url}: the proxy wants a password (HTTP 407): give its address with one, from the environment"
        )
    if status != 200:
        if config.model is None:
            raise UnreachableError(
                f"{url}/models: HTTP {status}: is the path right (.../v1)? Else name the model by --model"
            )
        return []
    try:
        return [{**entry, "id": str(entry["id"])} for entry in msgspec.json.decode(body)["data"]]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise UnreachableError(
            f"{url}/models: not an OpenAI-compatible list of models: is the path right (.../v1)?"
        ) from None


def _model(endpoint: HttpEndpoint, listed: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[str, int | None]:
    """The model of all replicas, and the longest context that all of them take. Raises UnreachableError where one lacks a model."""
    wanted = endpoint.config.model
    if wanted is None:
        if not listed[0]:
            raise UnreachableError(f"{endpoint.urls[0]}: lists no model: name one by --model")
        wanted = str(listed[0][0]["id"])
    by_role = [shape.model for shape in endpoint.config.roles.values() if shape.model is not None]
    for url, entries in zip(endpoint.urls, listed, strict=True):
        ids = [entry["id"] for entry in entries]
        for model in [wanted, *by_role]:
            if ids and model not in ids:
                raise UnreachableError(f"{url}: has no model {model!r}, but {', '.join(ids[:10])}")
    known = [entry.get("max_model_len") for entries in listed for entry in entries if entry["id"] == wanted]
    return wanted, min((length for length in known if isinstance(length, int)), default=None)


async def _server(endpoint: HttpEndpoint) -> str:
    """What serves, by its own word; replicas of several versions are all named."""
    found = list(dict.fromkeys(await asyncio.gather(*(_version(endpoint, url) for url in endpoint.urls))))
    if len(found) > 1:
        endpoint.notes.append(f"{endpoint.name}: its replicas are not alike: {', '.join(found)}")
    return ", ".join(found)


async def _version(endpoint: HttpEndpoint, url: str) -> str:
    try:
        status, body = await endpoint.lane.get(f"{url.removesuffix('/v1')}/version", endpoint.shape.headers)
        version = msgspec.json.decode(body)["version"] if status == 200 else None
    except (CallError, msgspec.DecodeError, KeyError, TypeError):
        version = None
    if version is None:
        return "unknown"
    return str(version) if str(version).startswith("fanmark-stub") else f"vllm {version}"
