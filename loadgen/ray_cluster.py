"""Workers on the nodes of a Ray cluster. Each is the very process that a local run starts; an actor on its node passes messages on.

Rules of the file:
1. Nothing but this file imports Ray, and only when a cluster is asked for.
2. The actor has no part in the run: it holds no clock, no records and no decision, and its threads do not disturb the worker's.
3. A call to the cluster may hang: whatever the run's start or end waits for has a limit.
"""

import asyncio
import os
import pickle
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fanmark.loadgen import embedded
from fanmark.loadgen.errors import PARTING, FanmarkError, ScenarioError, UnreachableError, writing
from fanmark.loadgen.stations import END_TIMEOUT_S, Clocks, LocalStation, open_local

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 8.0
_KNOCK_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 30.0  # of an actor that starts or hands over a file
_REVIVAL_TIMEOUT_S = 10.0  # of one on a node that may be gone
_PARTING_TIMEOUT_S = 5.0
_ECHOES = 9
_PIECE_BYTES = 4 << 20
_LEFT = ("queries.jsonl", "calls.jsonl", "begun.jsonl", "windows.jsonl")


class Host:
    """The actor beside a worker, on its node. `left`: a folder that another one's worker left there."""

    def __init__(self, left: str | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fanmark-")) if left is None else Path(left).parent
        self._station: LocalStation | None = None
        self._early: dict[int, bytes] = {}
        self._passed = 0

    async def open(self) -> tuple[str, str]:
        """Starts the worker; its folder, and the version of what runs here."""
        from importlib.metadata import version

        self._station = await open_local(self._folder / "worker")
        return str(self._station.out), version("fanmark")

    async def clocks(self) -> tuple[float, float]:
        """This node's, now: monotonic and time of day."""
        return time.monotonic(), time.time()

    async def put(self, number: int, data: bytes) -> None:
        """The driver's message with this number, to the worker in order: calls of an actor may overtake each other."""
        self._early[number] = data
        while self._station is not None and self._passed in self._early:
            self._station.link.put(self._early.pop(self._passed))
            self._passed += 1

    async def messages(self) -> AsyncIterator[bytes]:
        """The worker's, until it is gone."""
        assert self._station is not None
        while (data := await self._station.link.take()) is not None:
            yield data

    async def end(self) -> str:
        """Ends the worker; its last words."""
        return await self._station.end() if self._station is not None else ""

    async def piece(self, name: str, start: int) -> bytes | None:
        """Some of a file of the journal; None where there is no such file."""
        path = self._folder / "worker" / name
        if not path.exists():  # there is nothing else to do here
            return None
        with path.open("rb") as file:
            file.seek(start)
            return file.read(_PIECE_BYTES)

    async def clear(self) -> None:
        """Removes the journal."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Server:
    """The actor beside one of our own servers, on its node; the server ends with it."""

    async def open(self, module: str, flags: list[str]) -> str:
        """Starts the server; its address."""
        self._server = await embedded.start(module, flags)
        return self._server.url


class RayStation:
    """See Station. `bring` puts the journal into `here`."""

    ahead_s = 0.25

    def __init__(self, node: "Node", host: Any, out: str, clocks: Clocks, here: Path) -> None:
        self.node: str | None = node.address
        self.out = Path(out)
        self.clocks = clocks
        self._node = node
        self._host = host
        self._here = here
        self._messages = host.messages.options(num_returns="streaming").remote()
        self._sent = 0
        self._lost: str | None = None

    def put(self, data: bytes) -> None:
        """See Station."""
        if self._lost is None:
            self._host.put.remote(self._sent, data)
            self._sent += 1

    async def receive(self) -> Any:
        """See Station."""
        from ray.exceptions import RayError

        try:
            return pickle.loads(await (await anext(self._messages)))
        except StopAsyncIteration:
            return None
        except RayError as e:
            self._lost = _line(e)
            return None

    async def end(self) -> str:
        """See Station."""
        if self._lost is None:
            try:
                return str(await _answer(self._host.end.remote(), 2 * END_TIMEOUT_S))
            except UnreachableError as e:
                self._lost = str(e)
        return self._lost

    async def bring(self) -> Path | None:
        """See Station. What a lost actor's worker left is asked for by another one on the same node, if that lives."""
        try:
            if self._lost is not None:
                self._host = self._node.actor(left=str(self.out))
                await _answer(self._host.clocks.remote(), _REVIVAL_TIMEOUT_S)
            with writing(self._here):
                self._here.mkdir(exist_ok=True)
                for name in _LEFT:
                    await self._copy(name)
            return self._here
        except UnreachableError:
            return None

    async def _copy(self, name: str) -> None:
        start = 0
        with (self._here / name).open("wb") as file:  # the run is over
            while piece := await _answer(self._host.piece.remote(name, start), _ANSWER_TIMEOUT_S):
                file.write(piece)
                start += len(piece)
        if piece is None:
            (self._here / name).unlink()

    async def clear(self) -> None:
        """See Station."""
        shutil.rmtree(self._here, ignore_errors=True)
        try:
            await _answer(self._host.clear.remote(), END_TIMEOUT_S)
        except UnreachableError:
            return


@dataclass(frozen=True)
class Node:
    """One of a cluster's nodes that has a processor for a worker."""

    id: str
    address: str

    def actor(self, **how: Any) -> Any:
        """A Host there, on a processor that nobody else has; of one that reads what a worker left, on any."""
        return self.place(Host, 0 if how else 1, **how)

    def place(self, kind: type, cpus: int, **how: Any) -> Any:
        """An actor there."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(self.id, soft=False)
        return ray.remote(kind).options(num_cpus=cpus, scheduling_strategy=there).remote(**how)


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, nodes: list[Node], here: str, version: str) -> None:
        self.nodes = nodes
        self._here = here
        self._version = version

    @property
    def elsewhere(self) -> list[str]:
        """The addresses of nodes that are not on this machine."""
        return sorted({node.address for node in self.nodes} - {self._here})

    async def open(self, index: int, here: Path) -> RayStation:
        """The station of the worker with this number: nodes take turns. Raises FanmarkError."""
        node = self.nodes[index % len(self.nodes)]
        host = node.actor()
        out, version = await _answer(host.open.remote(), _ANSWER_TIMEOUT_S)
        if version != self._version:
            raise other_version(node.address, version, self._version)
        return RayStation(node, host, out, await _clocks(host), here)

    async def serve(self, index: int, module: str, flags: Sequence[str]) -> tuple[Any, str]:
        """Starts the server with this number on a node: its actor, with which it ends, and its address. Nodes take turns from the last on,
        for workers do from the first, and both are to find a processor. It listens to this machine alone where it is on it. Raises
        FanmarkError."""
        node = self.nodes[-1 - index % len(self.nodes)]
        host = "127.0.0.1" if node.address == self._here else node.address
        actor = node.place(Server, 1)
        return actor, str(
            await _answer(actor.open.remote(module, [*flags, "--host", host, "--port", "0"]), _ANSWER_TIMEOUT_S)
        )


async def _clocks(host: Any) -> Clocks:
    """By round trips: of the shortest, its middle is when the node looked."""
    found = []
    for _ in range(_ECHOES):
        sent_s, day_s = time.monotonic(), time.time()
        monotonic_s, theirs_s = await _answer(host.clocks.remote(), _ANSWER_TIMEOUT_S)
        half_s = (time.monotonic() - sent_s) / 2
        found.append((half_s, monotonic_s - sent_s - half_s, theirs_s - day_s - half_s))
    half_s, monotonic_ahead_s, day_ahead_s = min(found)
    return Clocks(monotonic_ahead_s, day_ahead_s, half_s)


async def _answer(ref: Any, timeout_s: float) -> Any:
    """What an actor answers. Raises UnreachableError."""
    from ray.exceptions import RayError

    try:
        async with asyncio.timeout(timeout_s):
            return await ref
    except TimeoutError:
        raise UnreachableError(
            f"a node of the Ray cluster did not answer within {timeout_s:g} s: has it a free CPU?"
        ) from None
    except RayError as e:
        raise lost(e) from None


def lost(error: Exception) -> UnreachableError:
    """What a node did not do, as ours."""
    return UnreachableError(f"a node of the Ray cluster: {_line(error)}")


def heard(wait: Callable[[], T]) -> T:
    """What is waited for from a cluster. Raises FanmarkError: one that was raised there is the same here."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return wait()
    except RayError as e:
        if isinstance(e, RayTaskError) and isinstance(e.cause, FanmarkError):
            raise e.cause from None
        raise lost(e) from None


def on_a_processor(function: Callable[..., Any]) -> Any:
    """The function, to be carried out on a processor of its own."""
    import ray

    return ray.remote(function).options(num_cpus=1)


def give_up(tasks: Sequence[Any], wait_s: float) -> None:
    """Has them end, and waits so long for it."""
    import ray

    for task in tasks:
        ray.cancel(task)
    ray.wait(tasks, num_returns=len(tasks), timeout=wait_s)


def other_version(node: str, theirs: str, ours: str) -> ScenarioError:
    return ScenarioError(f"node {node} has fanmark {theirs}, and this is {ours}: install the same")


def usable() -> list[dict[str, Any]]:
    """What Ray knows of the nodes that live and have a processor."""
    import ray

    return [each for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU", 0) >= 1]


def _line(error: Exception) -> str:
    """An error of Ray's, which may be a page with a frame, as a line."""
    lines = [line.strip(" |+-") for line in str(error).splitlines() if line.strip(" |+-")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


@asynccontextmanager
async def connected(address: str, version: str, *, mute: bool = True) -> AsyncIterator[Cluster]:
    """Connects to a cluster, for as long as the context lasts; `mute`: nothing goes to standard output meanwhile, where Ray prints pages on
    what a station says in a line. Raises FanmarkError, and that within 10 s."""
    if address.startswith("ray://"):
        raise ScenarioError(
            f"--ray {address}: Ray's client protocol carries no run: start fanmark on a node, with --ray auto"
        )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if mute else sys.stdout):  # noqa: ASYNC230
        await _in_thread(lambda: _connect(address), address)
        import ray

        try:
            nodes = [
                Node(each["NodeID"], each["NodeManagerAddress"])
                for each in sorted(usable(), key=lambda each: str(each["NodeID"]))
            ]
            if not nodes:
                raise UnreachableError(f"--ray {address}: no node of the cluster has a CPU for a worker")
            yield Cluster(nodes, ray.util.get_node_ip_address(), version)
        finally:
            _disconnect()


def _disconnect() -> None:
    """A head that no longer answers would hold Ray's farewell up. cli.py ends the process over a thread of that name."""
    import ray

    parting = threading.Thread(target=ray.shutdown, daemon=True, name=PARTING)
    parting.start()
    parting.join(_PARTING_TIMEOUT_S)


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray itself would ask an absent head again and again
        try:
            socket.create_connection((host, int(port)), _KNOCK_TIMEOUT_S).close()
        except OSError as e:
            raise UnreachableError(f"--ray {address}: nobody listens there ({e}): give the head's HOST:PORT") from None
    try:
        import ray
    except ImportError:
        raise ScenarioError(f"--ray {address}: Ray is not installed: pip install 'fanmark[ray]'") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise UnreachableError(f"--ray {address}: {_line(e)}") from None


async def _in_thread(act: Callable[[], None], address: str) -> None:
    """Ray may wait for an absent head for ever, so that is left to a thread that nobody waits for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[FanmarkError | None] = loop.create_future()

    def tell(error: FanmarkError | None) -> None:
        if not done.done():
            done.set_result(error)

    def connect() -> None:
        error: FanmarkError | None = None
        try:
            act()
        except FanmarkError as e:
            error = e
        loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            error = await done
    except TimeoutError:
        raise UnreachableError(
            f"--ray {address}: no head of a Ray cluster answered within {_CONNECT_TIMEOUT_S:g} s"
        ) from None
    if error is not None:
        raise error
