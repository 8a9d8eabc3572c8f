"""What a target's table becomes on the wire: keys and {env = NAME} filled in, the headers of every request, its TLS."""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.mistakes import show
from fanmark.loadgen.redaction import Secrets
from fanmark.loadgen.scenario import ClientCert, FromEnv, Target, ToolServer

T = TypeVar("T")

_MOST_KEY_BYTES = 65_536


@dataclass(frozen=True)
class Shape:
    """A target's table with its secrets in it. Only what goes over the wire is made of it."""

    headers: dict[str, str]
    query: str
    params: dict[str, Any]
    role_params: dict[str, dict[str, Any]]
    proxy: str | None
    secrets: Secrets

    def at(self, url: str) -> str:
        """The address of a request, with the query string that all of the target's have."""
        return f"{url}?{self.query}" if self.query else url


def target_key(name: str) -> str:
    """How a scenario writes the table of this target."""
    return "[target]" if name == "default" else f"[targets.{name}]"


def tool_server_key(index: int) -> str:
    """How a message calls the table of this tool server."""
    return f"[[tools.server]] number {index + 1}"


def key_hint(config: Target | ToolServer) -> str:
    """The mend where a server answers 401 or 403."""
    given = config.api_key_env or config.api_key_file
    return f"the key in {given} is refused" if given else "name its variable by api_key_env"


def shaped(config: Target, where: str, environ: Mapping[str, str]) -> Shape:
    """Reads the keys. Raises ScenarioError, which begins with `where` (the file and the table) and shows none of them."""
    secrets = Secrets()
    filled, table = _fillers(where, environ, secrets)
    headers = table(config.headers, "headers")
    key = _key(config, where, environ)
    if key is not None:
        secrets.add(key)
        bearer = "Bearer " if config.auth_header.lower() == "authorization" else ""
        headers[config.auth_header] = f"{bearer}{key}"
    for name, value in headers.items():
        if not value.isprintable() or not value.isascii() or value != value.strip():
            what = "the API key" if key is not None and name == config.auth_header else f"headers.{name}"
            raise ScenarioError(
                f"{where} {what}: its value (not shown) has a line end, a space around it or a character that no header "
                "can carry: give it in plain ASCII"
            )
    proxy = filled(config.proxy, "proxy")
    if proxy is not None and isinstance(config.proxy, FromEnv):
        for part in (urlsplit(proxy).password, urlsplit(proxy).netloc.rpartition("@")[0]):
            secrets.add(part or "")
    return Shape(
        headers=headers,
        query=urlencode(table(config.query, "query")),
        params=table(config.params, "params"),
        role_params={name: table(role.params, f"roles.{name}.params") for name, role in config.roles.items()},
        proxy=proxy,
        secrets=secrets,
    )


@dataclass(frozen=True)
class ToolShape:
    """A tool server's table with its secrets in it: headers and TLS of a URL, the environment of a command."""

    headers: dict[str, str]
    env: dict[str, str]
    tls: ssl.SSLContext | bool
    secrets: Secrets


def shaped_tool_server(config: ToolServer, where: str, environ: Mapping[str, str]) -> ToolShape:
    """As `shaped`."""
    shape = shaped(config.as_target, where, environ)
    env = _fillers(where, environ, shape.secrets)[1](config.env, "env")
    return ToolShape(shape.headers, env, own_tls(config.as_target, where), shape.secrets)


def _fillers(
    where: str, environ: Mapping[str, str], secrets: Secrets
) -> tuple[Callable[[Any, str], Any], Callable[[Mapping[str, Any], str], dict[str, Any]]]:
    """What puts the environment's values into a value, and into each of a table; they are secrets from then on."""

    def filled(value: Any, key: str) -> Any:
        """The value with every {env = NAME} in it read from the environment."""
        if isinstance(value, FromEnv) or (isinstance(value, dict) and value.keys() == {"env"}):
            name = value.env if isinstance(value, FromEnv) else str(value["env"])
            found = _variable(name, f"{where} {key} = {{ env = {show(name)} }}", environ)
            secrets.add(found)
            secrets.add(" ".join(found.split()))  # as a message says it, in one line
            return found
        if isinstance(value, dict):
            return {k: filled(v, f"{key}.{k}") for k, v in value.items()}
        return [filled(v, key) for v in value] if isinstance(value, list) else value

    def table(values: Mapping[str, Any], key: str) -> dict[str, Any]:
        return {k: filled(v, f"{key}.{k}") for k, v in values.items()}

    return filled, table


def _variable(name: str, given: str, environ: Mapping[str, str]) -> str:
    value = environ.get(name)
    if not value:
        raise ScenarioError(f"{given}: the value is missing: set the environment variable {name}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ScenarioError(f"{given}: the value (not shown) is not UTF-8: set the environment variable {name} anew")
    return value


def _key(config: Target, where: str, environ: Mapping[str, str]) -> str | None:
    """The API key, from the environment or from a file."""
    if config.api_key_env is not None:
        key = environ.get(config.api_key_env)
        if not key:
            raise ScenarioError(
                f"{where} api_key_env = {show(config.api_key_env)}: the API key is missing: set the environment variable "
                f"{config.api_key_env}"
            )
        return key
    if config.api_key_file is None:
        return None
    given = f"{where} api_key_file = {show(config.api_key_file)}"
    try:
        with Path(config.api_key_file).expanduser().open(encoding="utf-8") as file:
            key = file.read(_MOST_KEY_BYTES).strip()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise ScenarioError(
            f"{given}: cannot be read ({reason}): give a file with the API key, and nothing else"
        ) from None
    if not key:
        raise ScenarioError(f"{given}: is empty: give a file with the API key, and nothing else")
    return key


def own_tls(config: Target, where: str) -> ssl.SSLContext | bool:
    """As `tls_of`, or True where nothing of it is said. Raises ScenarioError."""
    own = config.ca_file is not None or config.client_cert is not None or config.insecure
    return tls_of(config, where) if own else True


def tls_of(config: Target, where: str) -> ssl.SSLContext:
    """How the target is recognised, and the client to it. Raises ScenarioError."""
    context = _loaded(
        lambda: ssl.create_default_context(cafile=config.ca_file), f"{where} ca_file = {show(config.ca_file)}"
    )
    if config.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    pair = config.client_cert
    if pair is not None:
        cert, key = (pair.cert, pair.key) if isinstance(pair, ClientCert) else (pair, None)
        given = f"{where} client_cert = {show(cert if key is None else {'cert': cert, 'key': key})}"

        def no_password() -> str:
            raise ValueError("the key has a password: give one without")

        _loaded(lambda: context.load_cert_chain(cert, key, no_password), given)
    return context


def _loaded(load: Callable[[], T], given: str) -> T:
    try:
        return load()
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        reason = e.strerror if isinstance(e, OSError) and not isinstance(e, ssl.SSLError) else str(e)
        raise ScenarioError(f"{given}: cannot be loaded ({reason}): give a PEM file") from None
