"""Map-reduce over a long document (LangChain's summarisation chain; LLMxMapReduce, arXiv 2410.09342).

map i:   reads S, its chunk
reduce:  reads S, Q, up to f results of the level below; repeated until one is left
"""

from dataclasses import dataclass

from fanmark.agents.runtime import Drawn, Expected, Key, Message, Runtime, Topology, at_least, together

CHUNK = (
    "Part {} of {} of the notes that belong to this question. Write down in a few sentences what this part alone has to say: facts, "
    "figures and names first. The part:"
)


@dataclass(frozen=True, slots=True)
class Params:
    """`chunks` of the document, `fan_in` results at most to a reduce call."""

    chunks: int = 16
    fan_in: int = 4

    def __post_init__(self) -> None:
        at_least(1, chunks=self.chunks)
        at_least(2, fan_in=self.fan_in)


async def run(rt: Runtime, p: Params) -> None:
    async def digest(i: int) -> Message:
        chunk = rt.message(("chunk", i), CHUNK.format(i + 1, p.chunks), per_query=True)
        return await rt.infer([rt.system, chunk], writes=("answer", 0, i), role="mapper")

    async def merge(level: int, i: int, group: list[Message]) -> Message:
        prompt = [rt.system, rt.question, *(rt.quote(result) for result in group)]
        return await rt.infer(prompt, writes=("answer", level, i), role="reducer", round=level + 1)

    results, level = await together(digest(i) for i in range(p.chunks)), 0
    while len(results) > 1:
        level += 1
        groups = [results[i : i + p.fan_in] for i in range(0, len(results), p.fan_in)]
        results = await together(merge(level, i, group) for i, group in enumerate(groups))


def expected(p: Params, _: Drawn) -> Expected:
    """e_0 = m, e_{i+1} = ceil(e_i / f) until 1: m calls read S and a chunk, the others S and Q; every result but the last is read once."""
    sizes = [p.chunks]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // p.fan_in))
    calls = sum(sizes)
    reads: dict[Key, int] = {("system",): calls, ("question",): calls - p.chunks}
    reads |= {("chunk", i): 1 for i in range(p.chunks)}
    reads |= {("quoted", "answer", level, i): 1 for level, size in enumerate(sizes[:-1]) for i in range(size)}
    return Expected(calls=calls, depth=len(sizes), width=p.chunks, writes={"answer": calls}, reads=reads)


TOPOLOGY = Topology(
    "map-reduce",
    "a call for every chunk, then calls that merge their results",
    Params,
    run,
    expected,
    "chunks ==> A | A | A | A ==> A | A --> A",
)
