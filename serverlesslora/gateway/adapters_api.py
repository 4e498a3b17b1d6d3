"""vLLM's two endpoints for loading and unloading adapters while the server runs, with its exact words."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, TypeVar

import msgspec

from serverlesslora.errors import InvalidRequest, ModelNotFound, NotFound
from serverlesslora.gateway.backend import Backend, ModelCard
from serverlesslora.registry.names import SEPARATOR

Body = TypeVar("Body")


class AdapterExists(InvalidRequest):
    code = "adapter_exists"


class LoadBody(msgspec.Struct, frozen=True):
    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool | None = None


class UnloadBody(msgspec.Struct, frozen=True):
    lora_name: str | None = None


class AdapterApi:
    """One operation per name at a time; different names do not wait for each other."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _card(self, name: str) -> ModelCard | None:
        try:
            return self._backend.model(name)
        except ModelNotFound:
            return None

    async def load(self, body: dict[str, Any], tenant: str | None = None) -> str:
        request = _convert(body, LoadBody)
        name, path = request.lora_name, request.lora_path
        if not name or not path:
            missing = "lora_path" if name else "lora_name"
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.", param=missing)
        if len(name) > 256 or not name.isprintable():
            raise InvalidRequest("'lora_name' must be at most 256 printable characters.", param="lora_name")
        if SEPARATOR in name:
            raise InvalidRequest(
                f"'lora_name' cannot have '{SEPARATOR}' in it, which leads to versions.", param="lora_name"
            )
        if "\0" in path or len(path) > 4096:
            raise InvalidRequest("'lora_path' is not a path.", param="lora_path")
        async with self._lock(name):
            card = self._card(name)
            if card is not None and card.parent is None:
                raise InvalidRequest(
                    f"The lora adapter name '{name}' conflicts with a served base model.", param="lora_name"
                )
            if card is not None and not request.load_inplace:
                raise AdapterExists(
                    f"The lora adapter '{name}' has already been loaded. "
                    "If you want to load the adapter in place, set 'load_inplace' to true.",
                    param="lora_name",
                )
            owner = tenant if card is None else card.tenant  # new weights do not make it somebody else's
            await self._backend.load_adapter(name, path, in_place=bool(request.load_inplace), tenant=owner)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, body: dict[str, Any]) -> str:
        name = _convert(body, UnloadBody).lora_name
        if not name:
            raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
        async with self._lock(name):
            card = self._card(name)
            if card is None or card.parent is None or card.id != card.name:  # a version is not removed here
                raise NotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
            await self._backend.unload_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."


def _convert(body: dict[str, Any], kind: type[Body]) -> Body:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"Invalid value: {error}.", code="invalid_value") from None
