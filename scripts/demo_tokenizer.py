"""The demo's tokenizer, one token per byte, with its chat template."""

from typing import Final

import tokenizers
import transformers
from demo_corpus import BOS, SPECIAL_TOKENS
from tokenizers import decoders, models, pre_tokenizers, processors

CHAT_TEMPLATE: Final = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] in ('system', 'developer') -%}<|system|>
  {%- elif message['role'] == 'user' -%}<|user|>
  {%- elif message['role'] == 'assistant' -%}<|assistant|>
  {%- else -%}{{- raise_exception('the demo knows no role ' ~ message['role']) -}}
  {%- endif -%}
  {%- if message['content'] is string -%}{{- message['content'] -}}
  {%- elif message['content'] -%}
    {%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, so that every text survives the round trip; the id of a byte is its value."""
    # The byte-level alphabet maps printable bytes to themselves and the others, in order, to code points from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
