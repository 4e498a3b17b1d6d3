"""LoRAX's `adapter_id` in OpenAI's bodies: another name for `model`, for clients that were written for that server.

It names a function of this server; nothing is fetched because a request says so.
"""

from __future__ import annotations

from typing import Any

from serverlesslora.errors import InvalidRequest, ModelNotFound
from serverlesslora.gateway.backend import Models
from serverlesslora.gateway.parsing import refuse_unserved

# What LoRAX does with an adapter that we do not, and the values that ask for nothing.
UNSERVED_ADAPTERS: dict[str, tuple[Any, ...]] = {
    "adapter_source": ("local",),
    "merged_adapters": (),
    "api_token": (),
}


def named_by_adapter(body: dict[str, Any], models: Models) -> dict[str, Any]:
    """The body with `adapter_id`, if it is there, as its `model`."""
    refuse_unserved(body, UNSERVED_ADAPTERS)
    adapter, model = body.get("adapter_id"), body.get("model")
    if adapter is None or adapter == "":
        return body
    name = function_named(adapter, models, "adapter_id")
    if model not in (None, "", name, models.model(name).parent):
        raise InvalidRequest("'adapter_id' and 'model' name different functions.", param="adapter_id")
    return body | {"model": name}


def function_named(adapter: Any, models: Models, param: str) -> str:
    """Raises InvalidRequest, or ModelNotFound for what this key may not ask either."""
    if not isinstance(adapter, str):
        raise InvalidRequest(f"'{param}' must be the name of a function.", param=param)
    try:
        return models.model(adapter).id
    except ModelNotFound as error:
        raise ModelNotFound(error.message, param=param) from None
