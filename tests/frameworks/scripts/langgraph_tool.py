"""LangGraph's tool-calling agent with langchain-openai, whose tool runs another such agent."""

from asking import Ask, run
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


def made(url: str, model: str, streams: bool) -> Ask:
    served = ChatOpenAI(base_url=url, api_key="none", model=model, streaming=streams)
    inner = create_agent(served, [], system_prompt="You are a specialist. Do the task you are given.")

    @tool
    async def ask_specialist(task: str) -> str:
        """Hands a task to a specialist."""
        result = await inner.ainvoke({"messages": [("user", task)]})
        return str(result["messages"][-1].content)

    outer = create_agent(served, [ask_specialist], system_prompt="You lead. Ask the specialist, then answer.")

    async def ask(question: str) -> None:
        asked = {"messages": [("user", question)]}
        if not streams:
            await outer.ainvoke(asked)
            return
        async for _ in outer.astream(asked, stream_mode="messages"):
            pass

    return ask


run(made)
