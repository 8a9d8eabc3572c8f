"""autogen-agentchat: a team of two takes turns, so that one reads what the other said; the first has a third agent as a tool."""

from asking import Ask, run
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_agentchat.tools import AgentTool
from autogen_ext.models.openai import OpenAIChatCompletionClient


def made(url: str, model: str, streams: bool) -> Ask:
    info = dict.fromkeys(("vision", "json_output", "structured_output"), False)
    served = OpenAIChatCompletionClient(
        model=model,
        base_url=url,
        api_key="none",
        parallel_tool_calls=False,
        model_info={**info, "function_calling": True, "family": "unknown"},
    )

    def agent(name: str, does: str, **more: object) -> AssistantAgent:
        return AssistantAgent(name, served, system_message=does, model_client_stream=streams, **more)

    async def ask(question: str) -> None:
        inner = agent("specialist", "You are a specialist. Do the task you are given.", description="Does a task.")
        outer = agent(
            "lead", "You lead. Ask the specialist, then answer.", tools=[AgentTool(inner)], reflect_on_tool_use=True
        )
        critic = agent("critic", "You say what is wrong with an answer.")
        await RoundRobinGroupChat([outer, critic], max_turns=2).run(task=question)

    return ask


run(made)
