"""Tools told in words, for chat templates that take none: definitions, calls and results become text of messages.

The words teach the format that Hermes models made common, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`,
so that the answer can be read again. How well a model that was never trained for it follows them is the model's affair.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_INSTRUCTIONS = """You can call functions. Each line between these tags is one, with a JSON schema of its parameters:
<tools>
{tools}
</tools>
To call a function, write a JSON object with its name and its arguments between tags, exactly so:
<tool_call>
{{"name": "the name", "arguments": {{"parameter": "value"}}}}
</tool_call>
Write one such block for each call, and nothing after them; the results come back between <tool_response> tags. \
If no function helps, answer in plain words."""


def with_tools_in_words(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], *, has_system: bool
) -> list[dict[str, Any]]:
    """`has_system`: the template takes a message of that role; elsewhere the first message carries the instructions."""
    if not tools:
        return messages
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    instructions = _INSTRUCTIONS.format(tools=lines)
    first = messages[0]
    if first.get("role") == "system" or not has_system:
        return [first | {"content": f"{instructions}\n\n{first.get('content') or ''}"}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def with_calls_in_words(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls become text of the assistant that made them, results messages of the user."""
    return [_told(message) for message in messages]


def _told(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    parts = [str(message["content"])] if message.get("content") else []
    parts += [f"<tool_call>\n{_call(call)}\n</tool_call>" for call in calls]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": "\n".join(parts)}


def _call(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    shown = {key: function.get(key) for key in ("name", "arguments")} if isinstance(function, dict) else call
    return json.dumps(shown, ensure_ascii=False)
