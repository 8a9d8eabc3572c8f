"""Record what agent frameworks send, for tests/data/frameworks: `python tests/frameworks/record.py` after `make test-frameworks`.

Each script runs against the stub, its questions together; between them stands a recorder. Texts are shortened alike wherever they
occur, so that what equals or contains another still does. Which question a request belongs to is known from a run with the questions
one after another: the stub says the same to the same prompt.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cases import CASES, PROMPT_CHARS, Case, ask  # noqa: E402
from stub_process import running_stub  # noqa: E402

DATA = ROOT / "tests" / "data" / "frameworks"
KEPT = ("user-agent", "x-stainless-retry-count", "x-stainless-async")


class Recorder:
    """Passes requests on, and keeps them with their replies and times."""

    def __init__(self, target: str) -> None:
        self.target, self.seen, self.began_at = target, list[dict[str, Any]](), time.monotonic()

    async def handle(self, request: web.BaseRequest) -> web.Response:
        raw, at = await request.read(), time.monotonic() - self.began_at
        seen: dict[str, Any] = {"path": request.path, "sent_at": round(at, 4)}
        self.seen.append(seen)
        headers = {name: text for name, text in request.headers.items() if name.lower() in (*KEPT, "content-type")}
        async with (
            ClientSession() as session,
            session.request(request.method, self.target + request.path, data=raw, headers=headers) as got,
        ):
            data, kind = await got.read(), got.content_type
        seen["done_at"] = round(time.monotonic() - self.began_at, 4)
        seen["headers"] = {name.lower(): text for name, text in headers.items() if name.lower() in KEPT}
        seen["body"], seen["reply"] = json.loads(raw), json.loads(data)
        return web.Response(body=data, status=got.status, content_type=kind)


async def recorded(case: Case, when: str, target: str) -> list[dict[str, Any]]:
    recorder = Recorder(target)
    runner = web.ServerRunner(web.Server(recorder.handle))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await asyncio.to_thread(ask, case, f"http://127.0.0.1:{runner.addresses[0][1]}/v1", "whole", when)
    finally:
        await runner.cleanup()
    return recorder.seen


def told(body: Mapping[str, Any]) -> str:
    """What a request says, without the ids that differ from run to run."""
    messages = json.loads(json.dumps(body.get("messages") or body.get("input")))
    text = json.dumps([[message.get("role"), message.get("content"), message.get("output")] for message in messages])
    return json.dumps([body.get("instructions"), text.split("'id': '")[0], len(messages)])


def shortened(value: Any) -> Any:
    """The same, with the long texts that frameworks bring along cut."""
    if isinstance(value, dict):
        return {key: shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shortened(part) for part in value]
    if isinstance(value, str) and len(value) > PROMPT_CHARS and value.startswith("You are an expert"):
        return value[:PROMPT_CHARS]
    return value


def main() -> None:
    with running_stub("--time-scale", "0.2", "--scripted-tools", "--answer-tokens", "12", "--answer-cv", "0.3") as stub:
        for case in CASES:
            apart, together = (asyncio.run(recorded(case, when, stub.url)) for when in ("apart", "together"))
            number = {told(each["body"]): place // case.calls for place, each in enumerate(apart)}
            assert len(apart) == len(together) == len(number), case.name
            requests = [{"query": number[told(each["body"])], **shortened(each)} for each in together]
            said = ",\n".join(json.dumps(each, ensure_ascii=False) for each in requests)
            about = json.dumps({"framework": case.pinned(), "calls": case.calls, "depth": case.depth})
            file = DATA / f"{case.name}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f'{about[:-1]}, "requests": [\n{said}\n]}}\n')
            print(file.name, len(requests), file.stat().st_size)


if __name__ == "__main__":
    main()
