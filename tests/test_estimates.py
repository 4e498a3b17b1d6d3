"""What a prompt is taken to have in tokens before anybody has counted them."""

from __future__ import annotations

from typing import Any

from serverlesslora.gateway.backend import CHARACTERS_PER_TOKEN, estimated_tokens
from serverlesslora_ipc.messages import ChatPrompt, TextPrompt, TokensPrompt


def test_all_that_a_template_writes_down_is_counted() -> None:
    def chat(tools: list[dict[str, Any]] | None = None, **message: Any) -> int:
        return estimated_tokens(ChatPrompt([{"role": "user", "content": "x" * 400, **message}], tools=tools))

    assert chat() == estimated_tokens(TextPrompt("x" * 400)) == 400 // CHARACTERS_PER_TOKEN + 1
    tool = {"type": "function", "function": {"name": "f", "description": "y" * 4000}}
    assert chat([tool]) >= chat() + 4000 // CHARACTERS_PER_TOKEN
    call = {"id": "1", "function": {"name": "f", "arguments": {"text": "z" * 800}}}
    assert chat(tool_calls=[call]) >= chat() + 800 // CHARACTERS_PER_TOKEN
    assert chat(reasoning_content="z" * 800) == chat() + 800 // CHARACTERS_PER_TOKEN
    assert estimated_tokens(TokensPrompt((1, 2, 3))) == 3
