"""What the scripts of openai-agents share: a model on /v1/responses, and how an agent is asked."""

from asking import Ask
from openai import AsyncOpenAI

from agents import Agent, OpenAIResponsesModel, Runner, set_tracing_disabled


def served(url: str, model: str) -> OpenAIResponsesModel:
    set_tracing_disabled(True)
    return OpenAIResponsesModel(model=model, openai_client=AsyncOpenAI(base_url=url, api_key="none"))


def asks(outer: Agent, streams: bool) -> Ask:
    async def ask(question: str) -> None:
        if not streams:
            await Runner.run(outer, question)
            return
        result = Runner.run_streamed(outer, question)
        async for _ in result.stream_events():
            pass

    return ask
