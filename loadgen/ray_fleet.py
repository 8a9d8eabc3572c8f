"""`fanmark serve stub|tools --ray ADDRESS --replicas N`: servers on the nodes of a Ray cluster, behind the router of the local ones."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fanmark.loadgen.ray_cluster import connected
from fanmark.servers.replicas import Starting


async def serve(address: str, version: str, routing: Callable[[Starting], Awaitable[None]]) -> None:
    """Routes until a signal, and what is started meanwhile is started on the nodes; it ends with this process. Raises FanmarkError."""
    async with connected(address, version, mute=False) as cluster:
        actors: list[Any] = []  # each ends when nobody holds it any more

        async def start(module: str, flags: Sequence[str], stack: AsyncExitStack) -> str:
            actors.append(None)
            place = len(actors) - 1
            actors[place], url = await cluster.serve(place, module, flags)
            return url

        await routing(start)
