"""`fanmark serve stub --ray ADDRESS --replicas N`: stubs on the nodes of a Ray cluster, behind the router of the local ones."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from fanmark.loadgen.ray_cluster import connected
from fanmark.servers import router
from fanmark.servers.stub import StubOptions


async def serve(address: str, options: StubOptions, argv: Sequence[str], version: str) -> None:
    """Has the replicas started on the nodes, and routes to them until a signal; they end with this process. Raises FanmarkError."""
    async with connected(address, version, mute=False) as cluster:
        actors: list[Any] = []  # each ends when nobody holds it any more

        async def start(flags: Sequence[str], stack: AsyncExitStack) -> str:
            actors.append(None)
            place = len(actors) - 1
            actors[place], url = await cluster.serve(place, "fanmark.servers.stub", flags)
            return url

        await router.serve(options, argv, start)
