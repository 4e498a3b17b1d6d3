"""How a model's chat template teaches it to call tools and to think aloud, read from the template itself.

Only what the gateway needs to take an answer apart again: the name of the format of tool calls, and the tags around
reasoning. A template that says nothing of either makes plain text.
"""

from __future__ import annotations

from typing import NamedTuple


class Dialect(NamedTuple):
    tool_format: str = ""  # a name that `gateway.tools` knows; empty: none was recognised
    reasoning_tags: tuple[str, str] | None = None

    def is_open(self, prompt: str) -> bool:
        """Whether the rendered prompt ends inside reasoning, so that the output begins there."""
        return self.reasoning_tags is not None and prompt.rstrip().endswith(self.reasoning_tags[0])


# The first mark found in a template decides; more specific ones come first.
_TOOL_MARKS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("<tool_call>", "hermes"),
    ("<function=", "functionary"),
)
_REASONING_TAGS = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"))


def dialect_of(template: str | dict[str, str] | None) -> Dialect:
    """Of a chat template, or of several by name."""
    source = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    tool_format = next((name for mark, name in _TOOL_MARKS if mark in source), "")
    tags = next((tags for tags in _REASONING_TAGS if tags[0] in source or tags[1] in source), None)
    return Dialect(tool_format, tags)
