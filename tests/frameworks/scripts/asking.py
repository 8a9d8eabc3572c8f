"""What the scripts share: their arguments (base URL, model, "whole" or "stream", "apart" or "together"), and three questions to ask."""

import asyncio
import sys
from collections.abc import Awaitable, Callable

Ask = Callable[[str], Awaitable[object]]
QUESTIONS = [f"How do harbours stay free of ice in winter number {number} of the century?" for number in range(3)]


def run(made: Callable[[str, str, bool], Ask]) -> None:
    """Ask the questions one after another, or all together; `made` makes what asks one from base URL, model, and whether it streams."""
    url, model, how, when = sys.argv[1:5]

    async def all_of_them() -> None:
        ask = made(url, model, how == "stream")
        if when == "together":
            await asyncio.gather(*map(ask, QUESTIONS))
        else:
            for question in QUESTIONS:
                await ask(question)

    asyncio.run(all_of_them())
