"""Rendering a chat with a template that its tenant wrote.

The template is code. transformers renders it in jinja's immutable sandbox (no attribute tricks, ranges capped, plain
JSON data only); here it also gets a bound on processor time, and whatever it raises is the client's or the template
owner's affair: a request error with the template's own words. The codec refuses text that cannot fit the context
before tokenising it; memory during rendering is bounded by the worker alone.
"""

from __future__ import annotations

import inspect
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from serverlesslora.engine.dialect import dialect_of, reads
from serverlesslora.engine.tool_text import with_calls_in_words, with_tools_in_words
from serverlesslora.errors import InvalidRequest
from serverlesslora_ipc.messages import ChatPrompt

if TYPE_CHECKING:
    from types import FrameType

    from transformers import PreTrainedTokenizerBase

RENDER_CPU_S = 2.0


class TemplateTooSlow(Exception):
    """Raised inside the template by the processor time limit."""


def render(tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str] | None, prompt: ChatPrompt) -> str:
    """The chat as text, special tokens included."""
    if not template:
        raise InvalidRequest(
            "This model has no chat template. Use the completions API, or add a chat_template.jinja to the adapter.",
            param="messages",
        )
    if not prompt.messages:
        raise InvalidRequest("'messages' must not be empty.", param="messages")
    _refuse_reserved(tokenizer, prompt.template_kwargs)
    source = _source(template, with_tools=bool(prompt.tools))
    variables = _variables(prompt.template_kwargs, source)
    messages, tools = _messages(prompt.messages, source), prompt.tools
    if not reads(source, "tools"):
        if not reads(source, "tool_calls"):
            messages = with_calls_in_words(messages)
        messages, tools = with_tools_in_words(messages, tools or (), has_system=_takes_system(source)), None
    try:
        with _cpu_limit(RENDER_CPU_S):
            text = tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=source,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                tokenize=False,
                **variables,
            )
    except TemplateTooSlow:
        raise InvalidRequest(
            f"The chat template did not finish within {RENDER_CPU_S:g} s of processor time.", param="messages"
        ) from None
    except Exception as error:  # the template is foreign code: it can raise anything
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise InvalidRequest(f"The chat template refused the messages: {reason}", param="messages") from error
    return str(text)


def _source(template: str | dict[str, str], *, with_tools: bool) -> str:
    """Some models have several templates by name; "tool_use" serves requests with tools, as in transformers."""
    if isinstance(template, str):
        return template
    name = "tool_use" if with_tools and "tool_use" in template else "default"
    if name not in template:
        raise InvalidRequest('The model has several chat templates but none is called "default".', param="messages")
    return template[name]


def _refuse_reserved(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> None:
    """Clients may set variables of the template, not replace it or change what is done with it."""
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters
    reserved = sorted((template_kwargs.keys() & arguments.keys()) - {"documents"})
    if reserved or "messages" in template_kwargs:
        raise InvalidRequest(
            f"'chat_template_kwargs' must not set {', '.join(reserved) or 'messages'}.", param="chat_template_kwargs"
        )


_SWITCHES = ("enable_thinking", "thinking")  # what templates call the variable that turns reasoning on and off


def _variables(template_kwargs: dict[str, Any], source: str) -> dict[str, Any]:
    """The variables that the template reads. One that it does not read is refused, because nothing would come of it;
    but a variable that is not set is false in a template, so a false one asks for nothing.

    A template that can only turn reasoning on and off takes any effort but "none" as on.
    """
    variables = dict(template_kwargs)
    reasons = dialect_of(source).reasoning_tags is not None
    effort = variables.get("reasoning_effort")
    if effort is not None and not reads(source, "reasoning_effort"):
        del variables["reasoning_effort"]
        switch = next((name for name in _SWITCHES if reads(source, name)), None)
        if switch is not None:
            variables.setdefault(switch, effort != "none")
        elif effort != "none" or reasons:
            raise InvalidRequest(
                "This model's chat template has no reasoning effort to set; leave 'reasoning_effort' out.",
                param="reasoning_effort",
            )
    for name, value in template_kwargs.items():
        if name in variables and not reads(source, name) and (value or (reasons and name in _SWITCHES)):
            raise InvalidRequest(
                f"This model's chat template does not read {name!r}; leave it out.", param="chat_template_kwargs"
            )
    return variables


def _takes_system(source: str) -> bool:
    """Some templates know the role only to refuse it."""
    return "system" in source and "system role not supported" not in source.lower()


def _messages(messages: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    # OpenAI renamed "system" to "developer". Templates that do not mention the new name would drop such a message or
    # write a role the model never saw, so it is renamed before rendering rather than after a failure.
    knows_developer = "developer" in source
    return [
        _parsed_tool_calls(message if knows_developer or message.get("role") != "developer" else message | _SYSTEM)
        for message in messages
    ]


_SYSTEM = {"role": "system"}


def _parsed_tool_calls(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends the arguments of a call as a JSON string; templates expect the object."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call  # a call the model made up badly is shown to it as it was
    return call | {"function": function | {"arguments": arguments}}


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TemplateTooSlow in the block after `seconds` of this process's user time.

    The virtual timer does not clash with wall-clock alarms. Signals reach the main thread only, which is where a
    worker's engine runs; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TemplateTooSlow

    previous = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
