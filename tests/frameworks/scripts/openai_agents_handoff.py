"""openai-agents as it comes, on /v1/responses: an agent hands the conversation over to another."""

from asking import Ask, run
from openai_agents_asking import asks, served

from agents import Agent


def made(url: str, model: str, streams: bool) -> Ask:
    on = served(url, model)
    inner = Agent(name="specialist", instructions="You are a specialist. Answer.", model=on)
    outer = Agent(name="triage", instructions="You hand over to the specialist.", model=on, handoffs=[inner])
    return asks(outer, streams)


run(made)
