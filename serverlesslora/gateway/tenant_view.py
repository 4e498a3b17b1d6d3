"""What one API key sees of the models: its tenant's functions that match its patterns, and backbones if it may."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from serverlesslora.errors import ModelNotFound
from serverlesslora.gateway.backend import Generation, GenerationRequest, ModelCard, Models
from serverlesslora.tenancy.key import Grant


class TenantView:
    """Implements `backend.Models`. What the key may not ask does not exist: one error, from one place, for both."""

    def __init__(self, models: Models, grant: Grant) -> None:
        self._models = models
        self._grant = grant

    def models(self) -> list[ModelCard]:
        return [card for card in self._models.models() if self._shows(card)]

    def model(self, name: str) -> ModelCard:
        card: ModelCard | None
        try:
            card = self._models.model(name)
        except ModelNotFound:
            card = None
        if card is None or not self._shows(card):
            raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")
        return card

    def generate(self, request: GenerationRequest) -> AbstractAsyncContextManager[Generation]:
        # Again, and with nothing in between: the name may have become another tenant's since the request was read.
        self.model(request.model)
        return self._models.generate(request)

    def _shows(self, card: ModelCard) -> bool:
        if card.parent is None:
            return self._grant.may_ask_backbones
        return self._grant.may_ask(card.name, card.tenant)
