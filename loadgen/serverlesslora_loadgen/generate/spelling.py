"""How a law is written on a command line: `kind`, `kind:value,value` or `kind:name=value,name=value`."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

import msgspec

from serverlesslora_loadgen.errors import LoadgenError, WorkloadError
from serverlesslora_loadgen.units import parse_seconds

T = TypeVar("T")


def parse_law(text: str, law: Any, what: str) -> Any:
    """`law` is a tagged union of Structs. Names may leave out the unit (`on=30` is `on_s`); times may have one (`1h`).

    Raises WorkloadError with all the forms there are.
    """
    kind, _, rest = text.strip().partition(":")
    structs: dict[str, type[msgspec.Struct]] = {each.__struct_config__.tag: each for each in get_args(law)}
    try:
        if kind not in structs:
            raise ValueError(f"{kind!r} is none of them")
        return convert({"kind": kind, **_fields(rest, structs[kind])}, law)
    except (ValueError, LoadgenError) as error:
        forms = ", ".join(_form(kind, struct) for kind, struct in structs.items())
        raise WorkloadError(f"{text!r} is not {what}: {error}; there are {forms}") from None


def convert(value: dict[str, Any], law: Any) -> Any:
    """Raises ValueError (which msgspec's own errors are)."""
    return msgspec.convert(value, law, strict=False)


def _fields(rest: str, struct: type[msgspec.Struct]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if not rest:
        return fields
    for position, part in enumerate(rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            if position >= len(struct.__struct_fields__):
                raise ValueError(f"{part!r} is one value too many")
            name, value = struct.__struct_fields__[position], part
        name = name.strip()
        if name not in struct.__struct_fields__ and f"{name}_s" in struct.__struct_fields__:
            name = f"{name}_s"
        fields[name] = parse_seconds(value) if name.endswith("_s") else value.strip()
    return fields


def _form(kind: str, struct: type[msgspec.Struct]) -> str:
    names = [name.removesuffix("_s") for name in struct.__struct_fields__]
    return f"{kind}:{','.join(f'{name}=…' for name in names)}" if names else kind
