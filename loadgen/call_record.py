"""What a reply tells of its call. Pure."""

from typing import TYPE_CHECKING

from fanmark.loadgen.lanes.sse import Reply
from fanmark.loadgen.records import Call

if TYPE_CHECKING:
    from fanmark.servers.engine.attribution import Weights


def take(call: Call, reply: Reply, weights: "Weights | None" = None) -> None:
    """What a reply tells of its call: stamps, and the server's counts. Where the server does not tell of GPU time, it is taken by
    `weights`, from the counts."""
    call.finish = reply.finish
    call.first_at, call.answer_at, call.done_at = reply.first_at, reply.answer_at, reply.done_at
    call.gaps, call.coalesced = reply.gaps, reply.coalesced
    usage = reply.usage
    if usage is None:
        return
    call.input_tokens, call.output_tokens = usage.prompt_tokens, usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        call.cached_tokens = usage.prompt_tokens_details.cached_tokens
    details = usage.completion_tokens_details
    call.reasoning_tokens = details.reasoning_tokens if details is not None else None
    if usage.fanmark is not None:
        work = usage.fanmark
        call.gpu_s, call.gpu_waste_s, call.joules = work.gpu_s, work.gpu_waste_s, work.joules
    elif (
        weights is not None and call.input_tokens is not None and call.cached_tokens is not None and call.output_tokens
    ):
        first = weights.request(call.input_tokens, call.cached_tokens, -(-call.output_tokens // call.samples))
        others = weights.request(call.input_tokens, call.input_tokens, call.output_tokens // call.samples)
        call.gpu_s = first.seconds + (call.samples - 1) * others.seconds
