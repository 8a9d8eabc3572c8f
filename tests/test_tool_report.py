"""What is told of the tools: from records, by hand."""

import two_arms

from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.tool_report import Listing, by_tool, tool_lines, tools_part

SCHEMA = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}


def made(number: int, done_at: float, **more: object) -> two_arms.Call:
    given = {"kind": "tool_call", "tool": "look", "target": None, "gaps": {}, "bytes": 100} | more
    return two_arms.call(number, (1.0, None, done_at), (None, None, None), after=[1], **given)


def test_tools_by_hand() -> None:
    calls = [
        two_arms.call(1, (0.0, 0.5, 1.0), (100, 0, 10)),
        made(2, 2.0, queued_s=0.25, session_s=0.5, opened_session=True),
        made(3, 4.0, queued_s=0.75, tool_error=True, bytes=300),
        made(4, 1.5, error="tool_transport", bytes=None),
        made(5, 1.0, tool="?", refused="unknown", bytes=None),
    ]
    query = two_arms.query("single", 0, calls, 0.0, 4.0)
    assert query.resources["tool_calls"] == 3
    run = reduced([query])
    found = by_tool(run.calls, query.resources["critical_path_s"] or 0.0)
    assert found["look"]["calls"] == 3
    assert found["look"]["errors"] == {"tool_error": 1, "tool_transport": 1}
    assert found["look"]["latency_s"]["mean"] == 2.0
    assert found["look"]["queued_s"]["mean"] == 0.5
    assert found["look"]["bytes"]["mean"] == 200
    assert found["look"]["critical_share"] == 0.75
    assert (found["?"]["calls"], found["?"]["refused"], found["?"]["latency_s"]) == (0, {"unknown": 1}, None)
    part = tools_part(Listing(1, "auto", "per_agent", [SCHEMA, SCHEMA], [SCHEMA], {"t": 40}), run.calls)
    assert part is not None
    assert part["listed"] == {"tools": 2, "bytes": 161}
    assert part["exposed"] == {"tools": 1, "bytes": 81, "tokens": 40}
    assert (part["sessions"]["count"], part["sessions"]["start_s"]["mean"]) == (1, 0.5)
    assert tool_lines({"tools": part, "arms": {"chain": {"by_tool": found}}}) == [
        "tools    1 of 2 in the prompts: 81 bytes, 40 tokens a call; 1 sessions started in 500.0 ms each",
        "         chain: 3 calls of 1 tools, 2,000.0 ms on average, 500.0 ms of it in the server's queue, "
        "errors: tool_error 1, tool_transport 1, refused: unknown 1",
    ]
    assert tools_part(None, run.calls) is None
    assert tool_lines({"tools": None}) == []
