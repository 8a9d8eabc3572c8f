"""openai-agents as it comes, on /v1/responses: an agent that has another as a tool."""

from asking import Ask, run
from openai import AsyncOpenAI

from agents import Agent, OpenAIResponsesModel, Runner, set_tracing_disabled


def made(url: str, model: str, streams: bool) -> Ask:
    set_tracing_disabled(True)
    served = OpenAIResponsesModel(model=model, openai_client=AsyncOpenAI(base_url=url, api_key="none"))
    inner = Agent(name="specialist", instructions="You are a specialist. Do the task you are given.", model=served)
    tool = inner.as_tool(tool_name="ask_specialist", tool_description="Hands a task to a specialist.")
    outer = Agent(name="lead", instructions="You lead. Ask the specialist, then answer.", model=served, tools=[tool])

    async def ask(question: str) -> None:
        if not streams:
            await Runner.run(outer, question)
            return
        result = Runner.run_streamed(outer, question)
        async for _ in result.stream_events():
            pass

    return ask


run(made)
