"""Chat completions: what to generate for a chat request, and the answer that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serverlesslora.gateway.answering import Answer, Opening
from serverlesslora.gateway.backend import GenerationRequest
from serverlesslora.gateway.chat_body import Chat, ChatBody, chat_of
from serverlesslora.gateway.chat_plain import ChatStream, ChatWhole
from serverlesslora.gateway.chat_spoken import SpokenStream, SpokenWhole
from serverlesslora.gateway.limits import HttpSettings


def parse_chat(
    body: Mapping[str, Any], request_id: str, settings: HttpSettings
) -> tuple[ChatBody, GenerationRequest, Callable[[Opening], Answer]]:
    """What to generate, and how to make an answer of it once the time of its beginning is known."""
    chat = chat_of(body, request_id, settings)

    def answer(opening: Opening) -> Answer:
        """Text is only taken apart where there may be something in it: the plain stream is the fast one."""
        is_plain = chat.offer is None and opening.dialect.reasoning_tags is None
        kind: Callable[[str, Chat, Opening], Answer]
        if chat.request.stream:
            kind = ChatStream if is_plain else SpokenStream
        else:
            kind = ChatWhole if is_plain else SpokenWhole
        return kind(f"chatcmpl-{request_id}", chat, opening)

    return chat.request, chat.generation, answer
