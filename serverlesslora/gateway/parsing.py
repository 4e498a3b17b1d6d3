"""From a decoded body to a struct, or to an error that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from serverlesslora.errors import InvalidRequest

T = TypeVar("T")

_PLACE = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")


def converted(body: Mapping[str, Any], kind: type[T]) -> T:
    """Raises InvalidRequest. Unknown fields are ignored; refusing the known ones that are not served comes before."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except OverflowError:
        raise InvalidRequest("A number in the body is out of range.") from None


def refuse_unserved(body: Mapping[str, Any], unserved: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Features we know and do not serve, with the values that ask for nothing. `None` never asks for anything."""
    for name, harmless in unserved.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            param = where + name
            raise InvalidRequest(
                f"'{param}' is not supported by this server.", param=param, code="unsupported_parameter"
            )


def _invalid(text: str) -> InvalidRequest:
    place = _PLACE.search(text)
    param = place[1].removesuffix("[...]") if place else ""
    reason = text[: place.start()] if place else text
    if missing := _MISSING.search(reason):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    return InvalidRequest(f"Invalid value for '{param}': {reason.lower()}.", param=param or None, code="invalid_value")
