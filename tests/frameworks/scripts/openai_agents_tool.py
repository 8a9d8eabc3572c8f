"""openai-agents as it comes, on /v1/responses: an agent that has another as a tool."""

from asking import Ask, run
from openai_agents_asking import asks, served

from agents import Agent


def made(url: str, model: str, streams: bool) -> Ask:
    on = served(url, model)
    inner = Agent(name="specialist", instructions="You are a specialist. Do the task you are given.", model=on)
    tool = inner.as_tool(tool_name="ask_specialist", tool_description="Hands a task to a specialist.")
    outer = Agent(name="lead", instructions="You lead. Ask the specialist, then answer.", model=on, tools=[tool])
    return asks(outer, streams)


run(made)
