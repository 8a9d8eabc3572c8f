"""smolagents: a tool-calling agent that manages another. It is synchronous, so each question has a thread."""

import asyncio

from asking import Ask, run
from smolagents import OpenAIServerModel, ToolCallingAgent
from smolagents.monitoring import LogLevel


def made(url: str, model: str, streams: bool) -> Ask:
    served = OpenAIServerModel(model_id=model, api_base=url, api_key="none")
    quiet = {"verbosity_level": LogLevel.OFF, "stream_outputs": streams}

    async def ask(question: str) -> None:
        inner = ToolCallingAgent([], served, name="specialist", description="Does a task that it is given.", **quiet)
        outer = ToolCallingAgent([], served, managed_agents=[inner], **quiet)
        await asyncio.to_thread(outer.run, question)

    return ask


run(made)
