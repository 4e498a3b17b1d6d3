"""How a model's chat template teaches it to call tools and to think aloud, read from the template itself.

Only what the gateway needs to take an answer apart again: the name of the format of tool calls, and the tags around
reasoning. A template that says nothing of either makes plain text. One that takes no tools is told about them in words
(`tool_text`), which teach the format of Hermes.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Dialect(NamedTuple):
    tool_format: str = ""  # a name that `gateway.tools` knows; empty: none was recognised
    reasoning_tags: tuple[str, str] | None = None

    def is_open(self, prompt: str) -> bool:
        """Whether the rendered prompt ends inside reasoning, so that the output begins there."""
        return self.reasoning_tags is not None and prompt.rstrip().endswith(self.reasoning_tags[0])

    @property
    def tool_marks(self) -> tuple[str, ...]:
        """What must not be lost of an output where a mark is a special token."""
        return _MARKS.get(self.tool_format, ())


# The first pattern found in a template decides; more specific ones come first, because templates quote one another.
_TOOL_PATTERNS = (
    (re.compile(r"\[TOOL_CALLS\]"), "mistral"),
    (re.compile(r"<｜tool▁calls▁begin｜>"), "deepseek"),
    (re.compile(r"<arg_key>|<\|tool_calls_section_begin\|>|<\|channel\|>"), ""),  # GLM, Kimi, gpt-oss: not read
    (re.compile(r"<parameter="), "qwen3_coder"),
    (re.compile(r"<function="), "functionary"),
    (re.compile(r"\[func_name1\("), "pythonic"),
    (re.compile(r"<\|python_tag\|>|\"parameters\": dictionary of argument name"), "llama3_json"),
    (re.compile(r"<tool_call>"), "hermes"),
)
_MARKS = {
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "deepseek": (
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        "<｜tool▁sep｜>",
    ),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "pythonic": ("<|python_start|>", "<|python_end|>"),
    "llama3_json": ("<|python_tag|>",),
    "hermes": ("<tool_call>", "</tool_call>"),
}
_REASONING_TAGS = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"))


def dialect_of(template: str | dict[str, str] | None) -> Dialect:
    """Of a chat template, or of several by name."""
    source = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    tags = next((tags for tags in _REASONING_TAGS if tags[0] in source or tags[1] in source), None)
    if source and not reads(source, "tools"):
        return Dialect("hermes", tags)
    return Dialect(next((name for pattern, name in _TOOL_PATTERNS if pattern.search(source)), ""), tags)


def reads(source: str, name: str) -> bool:
    """Whether a template may look at a variable: it has the word, outside of a longer one."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None
