"""Targets held against what is possible, before anything is sent to them. Pure. No value that may be a secret is shown."""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.mistakes import show
from fanmark.loadgen.prices import Prices
from fanmark.loadgen.redaction import is_secret_name
from fanmark.loadgen.scenario import OF_URL, Budget, FromEnv, Target, ToolServer
from fanmark.loadgen.shaping import target_key

_SECRET_PARAM = r"(.*_)?(api_?key|password|secret|access_?token|authorization)"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_BARE = ToolServer()
_PRIVATE_ENDINGS = ("localhost", "local", "internal", "lan", "home.arpa", "test")


def check_targets(targets: Mapping[str, Target], source: str) -> None:
    """Raises ScenarioError at the first mistake."""
    for name, target in targets.items():
        where = f"{source}: {target_key(name)}"
        _check_addresses(target, where)
        _check_lane(target, where)
        _check_secrets(target, where)
        _check_prices(target.prices, where)
        if target.power_url is not None and not re.match(r"nvml$|http://[^/\s@]+", target.power_url):
            raise ScenarioError(
                f'{where} power_url = {show(target.power_url)}: give http://HOST:PORT/metrics of a DCGM exporter, or "nvml"'
            )
        for url in target.metrics_urls:
            _check_metrics_url(target, url, where)


def _check_prices(prices: Prices | None, where: str) -> None:
    if prices is None:
        return
    for one, other in (("input", "output"), ("output", "input"), ("cached_input", "input")):
        if getattr(prices, one) is not None and getattr(prices, other) is None:
            raise ScenarioError(f"{where} prices: {one} without {other}: give both, in dollars per million tokens")
    if prices.input is None and prices.gpu_hour is None:
        raise ScenarioError(
            f"{where} prices: no price is given: give input and output (per million tokens) or gpu_hour"
        )
    if prices.gpus != 1 and prices.gpu_hour is None:
        raise ScenarioError(
            f"{where} prices: gpus = {prices.gpus} without gpu_hour: give the dollars of a GPU for an hour"
        )


def check_tool_server(server: ToolServer, where: str) -> None:
    """Raises ScenarioError where keys are not for its kind, or a target's might not be so either."""
    of_other = [
        key for key in (OF_URL if server.url is None else ("env",)) if getattr(server, key) != getattr(_BARE, key)
    ]
    if of_other:
        own = "a command has env = { NAME = ... }" if server.url is None else "a url has headers = { NAME = ... }"
        raise ScenarioError(f"{where} {of_other[0]}: it is for a {'url' if server.url is None else 'command'}: {own}")
    if server.url is None:
        _check_plain("env", server.env, where)
        for name in server.env:
            if not re.fullmatch(_VARIABLE, name):
                raise ScenarioError(f"{where} env: {show(name)} is no variable's name: use letters, digits and _")
        _check_variables(_inside(server.env, "env"), where)
        return
    _check_address(server.url, "url", where, "http://HOST:PORT/mcp")
    secret = next((name for name, _ in parse_qsl(urlsplit(server.url).query, True) if is_secret_name(name)), None)
    if secret is not None:
        raise ScenarioError(
            f"{where} url: a secret stands in the address (not shown), as {secret}: give it in a header, as headers.NAME = "
            '{ env = "NAME" }'
        )
    _check_lane(server.as_target, where)
    _check_secrets(server.as_target, where)


def check_budget(budget: Budget | None, targets: Mapping[str, Target], source: str) -> None:
    """Raises ScenarioError where a cap is missing, or could not be held for want of prices."""
    if budget is None:
        return
    if budget == Budget():
        raise ScenarioError(f"{source}: [budget]: no cap is given: give dollars, tokens or calls")
    if budget.dollars is not None and not targets:
        raise ScenarioError(
            f"{source}: [budget] dollars = {budget.dollars:g}: the embedded stub costs nothing: give tokens or calls"
        )
    for name, target in targets.items():
        if budget.dollars is not None and (target.prices is None or target.prices.input is None):
            raise ScenarioError(
                f"{source}: [budget] dollars = {budget.dollars:g}: {target_key(name)} has no prices: give "
                "prices = { input = ..., output = ... }, in dollars per million tokens"
            )


def _check_addresses(target: Target, where: str) -> None:
    if target.profile is not None and not target.is_reachable:
        return
    if (target.url is None) == (not target.urls):
        given = "both url and urls" if target.urls else "url is missing"
        raise ScenarioError(
            f'{where}: {given}: give url = "http://HOST:PORT/v1", or urls = [...] of the replicas of one service'
        )
    for url in target.replicas if target.url is None else [target.url]:
        key = "url" if target.url is not None else "urls"
        _check_address(url, key, where, "http://HOST:PORT/v1")
        if "?" in url or "#" in url:
            raise ScenarioError(
                f"{where} {key} = {show(re.split('[?#]', url)[0])} with a query string: give it as query = {{ NAME = ... }}"
            )
    if len(set(target.replicas)) < len(target.replicas):
        raise ScenarioError(f"{where} urls: an address stands there twice: give each replica once")


def _check_address(url: str, key: str, where: str, like: str) -> None:
    if "@" in url:
        raise ScenarioError(
            f'{where} {key}: a name or password stands in the address (not shown): give headers.Authorization = {{ env = "NAME" }}'
        )
    if not re.match(r"https?://[^/\s?#]+", url):
        raise ScenarioError(f"{where} {key} = {show(url)}: must be {like} or https://...")


def _check_metrics_url(target: Target, url: str, where: str) -> None:
    if "@" in url:
        raise ScenarioError(f"{where} metrics_urls: a name or password stands in the address (not shown): leave it out")
    if not re.match(r"https?://[^/\s]+", url):
        raise ScenarioError(f"{where} metrics_urls: {show(url)}: must be http://HOST:PORT/metrics or https://...")
    plain = target.proxy is None and all(own.startswith("http://") for own in target.replicas)
    if url.startswith("https://") and plain and target.lane != "aiohttp":
        raise ScenarioError(
            f'{where} metrics_urls: {show(url)}: the fast lane carries plain http:// only: say lane = "aiohttp"'
        )


def _check_lane(target: Target, where: str) -> None:
    shown = "{ env = ... }" if isinstance(target.proxy, FromEnv) else show(target.proxy)
    tls = [key for key in ("ca_file", "client_cert", "insecure") if getattr(target, key)]
    plain = [url for url in target.replicas if url.startswith("http://")]
    if target.lane == "fast" and (target.proxy is not None or len(plain) < len(target.replicas)):
        other = next((url for url in target.replicas if url not in plain), "")
        carries = f"url = {show(other)}" if target.proxy is None else f"proxy = {shown}"
        raise ScenarioError(
            f'{where} lane = "fast" with {carries}: it carries plain http:// without a proxy: use "auto" or "aiohttp"'
        )
    if tls and len(plain) == len(target.replicas):
        raise ScenarioError(
            f"{where} {tls[0]} with {show(plain[0])}: it is for https:// only: mend the address, or leave it out"
        )
    if target.insecure and target.ca_file is not None:
        raise ScenarioError(f"{where}: both ca_file and insecure = true: give one of the two")


def _check_secrets(target: Target, where: str) -> None:
    if target.api_key_env is not None and target.api_key_file is not None:
        raise ScenarioError(f"{where}: both api_key_env and api_key_file: give one of the two")
    if isinstance(target.proxy, str) and "@" in target.proxy:
        raise ScenarioError(
            f'{where} proxy: a password stands in it (not shown): put the whole address into the environment: proxy = {{ env = "NAME" }}'
        )
    for key in ("headers", "query"):
        _check_plain(key, getattr(target, key), where)
    for where_, params in [
        ("params", target.params),
        *((f"roles.{r}.params", s.params) for r, s in target.roles.items()),
    ]:
        for name, value in params.items():
            if isinstance(value, str) and re.fullmatch(_SECRET_PARAM, name, re.IGNORECASE):
                raise ScenarioError(
                    f'{where} {where_}.{name}: a secret stands in the scenario (not shown): give {name} = {{ env = "NAME" }}'
                )
    for name in [*target.headers, target.auth_header]:
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ScenarioError(f"{where} headers: {show(name)} is no header's name: use letters, digits and -")
    if (target.api_key_env or target.api_key_file) and target.auth_header.lower() in map(str.lower, target.headers):
        raise ScenarioError(f"{where}: both an API key and headers.{target.auth_header}: give one of the two")
    named = [("api_key_env", target.api_key_env)] if target.api_key_env is not None else []
    _check_variables([*named, *_variables(target)], where)


def _check_plain(key: str, values: Mapping[str, str | FromEnv], where: str) -> None:
    """No value stands in the scenario whose name says that it is a secret."""
    for name, value in values.items():
        if isinstance(value, str) and is_secret_name(name):
            raise ScenarioError(
                f'{where} {key}.{name}: a secret stands in the scenario (not shown): give {name} = {{ env = "NAME" }}'
            )


def _check_variables(named: Iterable[tuple[str, str]], where: str) -> None:
    for key, variable in named:
        if not re.fullmatch(_VARIABLE, variable) or _looks_like_a_key(variable):
            raise ScenarioError(
                f"{where} {key}: what is given (not shown) looks like the secret itself: give the name of an environment "
                "variable that holds it"
            )


def _variables(target: Target) -> Iterator[tuple[str, str]]:
    """The names of all variables that the table refers to, with where they stand."""
    for key in ("headers", "query", "params"):
        for name, value in getattr(target, key).items():
            yield from _inside(value, f"{key}.{name}")
    for role, shape in target.roles.items():
        for name, value in shape.params.items():
            yield from _inside(value, f"roles.{role}.params.{name}")
    yield from _inside(target.proxy, "proxy")


def _inside(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, FromEnv):
        yield key, value.env
    elif isinstance(value, dict) and value.keys() == {"env"}:
        yield key, str(value["env"])
    elif isinstance(value, dict):
        for name, below in value.items():
            yield from _inside(below, f"{key}.{name}")
    elif isinstance(value, list):
        for below in value:
            yield from _inside(below, key)


def _looks_like_a_key(name: str) -> bool:
    """Whether it is long, and letters of both kinds or small ones stand among digits, as in no variable's name."""
    return len(name) >= 20 and any(c.isdigit() for c in name) and any(c.islower() for c in name)


def carries_key(target: Target) -> bool:
    """Whether requests to the target carry a secret: an API key, or a header or query value out of the environment."""
    given = [*target.headers.values(), *target.query.values()]
    return bool(target.api_key_env or target.api_key_file) or any(isinstance(value, FromEnv) for value in given)


def is_private(url: str) -> bool:
    """Whether the host of an address is, by its name or number alone, one that only the user's own network knows."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        if re.fullmatch(r"[0-9.]+|0x[0-9a-f.x]+", host):
            return False  # a number as only the C library reads it
        return bool(host) and ("." not in host or host.endswith(tuple(f".{end}" for end in _PRIVATE_ENDINGS)))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    shared = address.version == 4 and address in ipaddress.ip_network(
        "100.64.0.0/10"
    )  # of carriers and overlay networks
    return address.is_private or address.is_loopback or address.is_link_local or shared
