"""Make a tiny Qwen3 with random weights, so that a real vLLM can be tested without a GPU and without a download.

    .venv-vllm/bin/python tests/vllm/build_model.py FOLDER

4 layers of width 256, about 4 million parameters in bfloat16, a context of 16,384 tokens, a vocabulary of 4,096. The
tokenizer is a byte-level BPE trained here on the sources of Python's standard library; the chat template has the form
of ChatML. Both are additive where messages meet: every message stands between special tokens, so a conversation has the
tokens of its messages one after another. Runs under the Python of .venv-vllm (torch, tokenizers, transformers).
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT_TOKENS = 16_384
VOCABULARY = 4_096
WIDTH = 256
LAYERS = 4
HEAD_WIDTH = 64
SEED = 0

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen3 keeps these in the vocabulary as ordinary text, which is what vLLM's tool and reasoning parsers look for.
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

CHAT_TEMPLATE = """\
{%- macro block(role, text) -%}
{{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}
{%- endmacro -%}
{%- if tools -%}
{%- set ns = namespace(text='You may call these tools:') -%}
{%- for tool in tools -%}{%- set ns.text = ns.text + '\\n' + (tool | tojson) -%}{%- endfor -%}
{{ block('system', ns.text) }}
{%- endif -%}
{%- for message in messages -%}
{%- set ns = namespace(text=message.content if message.content is string else '') -%}
{%- for item in message.tool_calls or [] -%}
{%- set f = item.function or item -%}
{%- set arguments = f.arguments if f.arguments is string else f.arguments | tojson -%}
{%- set ns.text = ns.text + '\\n<tool_call>\\n{"name": "' + f.name + '", "arguments": ' + arguments + '}\\n</tool_call>'
-%}
{%- endfor -%}
{{ block(message.role, ns.text) }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the standard library's sources, white space collapsed.

    Collapsed because JSON allows any white space: with tokens for long runs of it, random weights that are held to a
    JSON grammar would write blanks until max_tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS) - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = (re.sub(r"\s+", " ", file.read_text(encoding="utf-8", errors="replace")) for file in sources)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (END_OF_TEXT, START, END)])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKS])
    return tokenizer


def main(folder: Path) -> None:
    """Write tokenizer, config and weights to `folder`."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        eos_token=END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    pad, end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, END])
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD_WIDTH,
        num_key_value_heads=WIDTH // HEAD_WIDTH // 2,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=pad,
        eos_token_id=end,
        pad_token_id=pad,
    )
    config.dtype = "bfloat16"
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": True, "temperature": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"vllm: {folder} has {len(tokenizer)} tokens and {parameters:,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: build_model.py FOLDER")
    main(Path(sys.argv[1]))
