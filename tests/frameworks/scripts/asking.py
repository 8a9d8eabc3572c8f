"""What the scripts share: three questions, and their arguments: base URL, model, "whole" or "stream", "apart", "together" or "alike"."""

import asyncio
import sys
from collections.abc import Awaitable, Callable

Ask = Callable[[str], Awaitable[object]]
QUESTIONS = [f"How do harbours stay free of ice in winter number {number} of the century?" for number in range(3)]


def run(made: Callable[[str, str, bool], Ask]) -> None:
    """Ask the questions one after another, all together, or the first three times at once. `made` makes what asks one, from base URL,
    model, and whether it streams."""
    url, model, how, when = sys.argv[1:5]

    async def all_of_them() -> None:
        ask = made(url, model, how == "stream")
        if when != "apart":
            await asyncio.gather(*map(ask, QUESTIONS if when == "together" else 3 * QUESTIONS[:1]))
        else:
            for question in QUESTIONS:
                await ask(question)

    asyncio.run(all_of_them())
