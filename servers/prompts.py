"""The prompt that a chat request is: texts encoded apart, no template, so lengths add up exactly.

The order is: the JSON text of the tools, if there are any, then each message's texts. Shared by the stub and by whoever must
know a prompt's length beforehand.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fanmark.servers.body_fields import bad_value
from fanmark.servers.tokenizer import Tokenizer


def tools_text(tools: Sequence[Any]) -> str:
    """The text that the tools' schemas are in a chat prompt."""
    return json.dumps(tools, ensure_ascii=False)


def call_texts(name: str, arguments: str) -> tuple[str, str, str]:
    """A tool call as the model writes it, in the three texts that are encoded apart; it comes back as the same tokens."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": ', arguments, "}\n</tool_call>"


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """The texts of one chat message: its content, or the text parts of it, and the tool calls it made.

    Raises ApiError where a part is not text.
    """
    content = message.get("content")
    texts: list[str] = []
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        for part in content:
            text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str):
                raise bad_value("This server takes text parts only: it is not a multimodal model.")
            texts.append(text)
    for call in message.get("tool_calls") or ():
        function = call.get("function", {}) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments", "")
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        texts.extend(call_texts(str(function.get("name", "")), arguments))
    return texts


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> list[int]:
    """Token ids of a chat prompt: the tools' text, if there are tools, then the messages' texts, without a template."""
    ids = list(tokenizer.encode(tools_text(tools))) if tools else []
    for message in messages:
        for text in message_texts(message):
            ids += tokenizer.encode(text)
    return ids
