"""What the worker does for tools and reasoning: words for templates without tools, variables, marks that stay text."""

from __future__ import annotations

from typing import Any

import pytest

from serverlesslora.engine.prompts import TextCodec
from serverlesslora_ipc.messages import ChatPrompt
from tests.test_prompts import TEMPLATE, USER, byte_tokenizer, codec, refusal, rendered

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
CALLED: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": "So:", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
]
TAKES_SYSTEM = "{# system #}" + TEMPLATE


def test_tools_become_a_system_message_where_the_template_takes_none() -> None:
    text = rendered([USER], TAKES_SYSTEM, tools=TOOLS)
    assert text.startswith("<|system|>You can call functions")
    assert '{"name": "f", "parameters": {"type": "object"}}' in text
    assert '<tool_call>\n{"name": "the name", "arguments": {"parameter": "value"}}\n</tool_call>' in text
    assert text.endswith("</s><|user|>hi</s><|assistant|>")
    own = rendered([{"role": "system", "content": "Be nice."}, USER], TAKES_SYSTEM, tools=TOOLS)
    assert own.count("<|system|>") == 1
    assert "\n\nBe nice.</s><|user|>hi" in own


@pytest.mark.parametrize("template", [TEMPLATE, "{{ '' if 1 else 'System role not supported' }}" + TEMPLATE])
def test_tools_go_before_the_first_message_where_there_is_no_system(template: str) -> None:
    text = rendered([USER], template, tools=TOOLS)
    assert text.startswith("<|user|>You can call functions")
    assert text.endswith("\n\nhi</s><|assistant|>")


def test_calls_and_results_become_words() -> None:
    assert rendered(CALLED) == (
        '<|user|>hi</s><|assistant|>So:\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call></s>'
        "<|user|><tool_response>\n7\n</tool_response></s><|assistant|>"
    )


def test_a_template_that_takes_tools_gets_them() -> None:
    template = "{{ tools[0].function.name }}{% for m in messages %}{{ m.role }}{{ m.tool_calls }}{% endfor %}"
    text = rendered(CALLED, template, tools=TOOLS)
    assert text.startswith("fuserassistant[{")
    assert "You can call" not in text


SWITCH = "{% if enable_thinking %}on{% else %}off{% endif %}<think></think>"


def test_reasoning_effort_is_passed_or_switches_or_is_refused() -> None:
    def told(template: str, **variables: Any) -> str:
        return rendered([USER], template, template_kwargs=variables)

    assert told("{{ reasoning_effort }}", reasoning_effort="low") == "low"
    assert told(SWITCH, reasoning_effort="none").startswith("off")
    assert told(SWITCH, reasoning_effort="high").startswith("on")
    assert told(SWITCH, reasoning_effort="high", enable_thinking=False).startswith("off")
    assert told(TEMPLATE, reasoning_effort="none", enable_thinking=False) == rendered([USER])
    for template, variables, param in (
        (TEMPLATE, {"reasoning_effort": "high"}, "reasoning_effort"),
        ("<think></think>", {"reasoning_effort": "none"}, "reasoning_effort"),
        ("<think></think>", {"enable_thinking": False}, "chat_template_kwargs"),
        (TEMPLATE, {"enable_thinking": True}, "chat_template_kwargs"),
        (TEMPLATE, {"mood": "calm"}, "chat_template_kwargs"),
    ):
        assert refusal(codec(template), ChatPrompt([USER], template_kwargs=variables)).param == param


def test_marks_that_are_special_tokens_stay_in_the_text() -> None:
    tokenizer = byte_tokenizer(("[TOOL_CALLS]", "<think>", "<other>"))
    template = "{% if tools %}[TOOL_CALLS]{% endif %}<think>" + TEMPLATE
    text = TextCodec(tokenizer, (257,), context_length=1000, template=template)
    written = tokenizer.convert_tokens_to_ids(["<think>", "a", "<other>", "[TOOL_CALLS]", "b"])

    def shown(prompt: ChatPrompt | None) -> str:
        detokenizer = text.detokenizer((), prompt=prompt)
        return "".join(detokenizer.push(token_id) for token_id in written) + detokenizer.flush()

    assert shown(ChatPrompt([USER], tools=TOOLS)) == "<think>a[TOOL_CALLS]b"
    assert shown(ChatPrompt([USER])) == "<think>ab"
    assert shown(None) == "ab"


def test_an_output_may_begin_inside_reasoning() -> None:
    opens = codec(TEMPLATE + "<think>\n")
    prompt = ChatPrompt([USER])
    assert opens.begins_reasoning(prompt, opens.encode(prompt))
    closed = codec(TEMPLATE + "<think>\n\n</think>\n\n")
    assert not closed.begins_reasoning(prompt, closed.encode(prompt))
    assert not codec().begins_reasoning(prompt, codec().encode(prompt))
