"""pydantic-ai: an agent whose tool runs another agent."""

from asking import Ask, run
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


def made(url: str, model: str, streams: bool) -> Ask:
    served = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    inner = Agent(served, instructions="You are a specialist. Do the task you are given.")
    outer = Agent(served, instructions="You lead. Ask the specialist, then answer.")

    @outer.tool_plain
    async def ask_specialist(task: str) -> str:
        """Hands a task to a specialist."""
        return (await inner.run(task)).output

    async def ask(question: str) -> None:
        if not streams:
            await outer.run(question)
            return
        async with outer.run_stream(question) as result:
            async for _ in result.stream_text():
                pass

    return ask


run(made)
