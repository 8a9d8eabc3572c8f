"""A tap in this process, on a loop beside what goes through it, for tests."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fanmark.loadgen.records import Query, read_queries
from fanmark.loadgen.tap.session import Options, Tap, tap

T = TypeVar("T")

SALT = b"of this test alone"


async def through(target: str, out: Path, use: Callable[[str], Awaitable[T]], **more: Any) -> tuple[T, dict[str, Any]]:
    """What `use` finds, given the tap's address (without /v1), and the summary that the tap leaves."""
    given: dict[str, Any] = {"version": "test", "command": [], "progress": None, "salt": SALT, "idle_s": 0.5} | more
    opened: asyncio.Future[Tap] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(tap(Options(target, out, **given), opened.set_result))
    await asyncio.wait([opened, task], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        found = await use(opened.result().url)
    finally:
        opened.result().ask()
    return found, (await task).summary


def by_seed(folder: Path) -> dict[str, Query]:
    """The queries of a tapped folder by the id of what groups their calls."""
    queries = list(read_queries(folder))
    found = {query.seed: query for query in queries}
    assert len(found) == len(queries)
    return found
