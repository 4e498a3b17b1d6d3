"""What a family of endpoints asks of the gateway: the body of a request, what its key may see, and an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from serverlesslora.gateway.answering import Answer, Opening
from serverlesslora.gateway.backend import GenerationRequest, Models
from serverlesslora.gateway.limits import HttpSettings


class Front(Protocol):
    """The rules that hold for every generation, whichever API it came by, are behind these."""

    settings: HttpSettings

    async def asked(self, request: Request) -> dict[str, Any]:
        """The body of a request that generates; raises Unavailable while the server is shutting down."""

    def seen_by(self, request: Request) -> Models:
        """What this request's key may ask."""

    def answer(
        self,
        request: Request,
        generations: Sequence[GenerationRequest],
        make_answer: Callable[[Opening], Answer],
        *,
        stream: bool = False,
    ) -> Response: ...
