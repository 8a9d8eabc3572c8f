"""openai-agents as it comes, on /v1/responses: an agent hands the conversation over to another."""

from asking import Ask, run
from openai import AsyncOpenAI

from agents import Agent, OpenAIResponsesModel, Runner, set_tracing_disabled


def made(url: str, model: str, streams: bool) -> Ask:
    set_tracing_disabled(True)
    served = OpenAIResponsesModel(model=model, openai_client=AsyncOpenAI(base_url=url, api_key="none"))
    inner = Agent(name="specialist", instructions="You are a specialist. Answer.", model=served)
    outer = Agent(name="triage", instructions="You hand over to the specialist.", model=served, handoffs=[inner])

    async def ask(question: str) -> None:
        if not streams:
            await Runner.run(outer, question)
            return
        result = Runner.run_streamed(outer, question)
        async for _ in result.stream_events():
            pass

    return ask


run(made)
