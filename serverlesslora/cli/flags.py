"""Command-line flags made from the fields of the config schema, so that names, help and defaults exist once."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
from msgspec import inspect

from serverlesslora.config import ServerConfig

# These have a syntax of their own on the command line.
NOT_FLAGS = ("backbones", "functions", "tenants")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per scalar or list field of ServerConfig; flags that are not given leave no trace in the namespace."""
    schema = inspect.type_info(ServerConfig)
    assert isinstance(schema, inspect.StructType)
    types = {field.name: field.type for field in schema.fields}
    for field in msgspec.structs.fields(ServerConfig):
        if field.name in NOT_FLAGS:
            continue
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        plain, description = _describe(types[field.name])
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        shown = {None: "none", (): "none"}.get(default, default)
        options["help"] = f"{description} [{shown}]".replace("%", "%%")
        match plain:
            case inspect.BoolType():
                options["action"] = argparse.BooleanOptionalAction
            case inspect.LiteralType(values=values):
                options["choices"] = values
            case inspect.VarTupleType():
                options |= {"action": "append", "metavar": "VALUE"}
            case inspect.IntType():
                options |= {"type": int, "metavar": "N"}
            case inspect.FloatType():
                options |= {"type": float, "metavar": "SECONDS" if field.name.endswith("_s") else "X"}
            case _:
                options["metavar"] = "TEXT"
        name = field.name.removesuffix("s" if "action" in options and "metavar" in options else "_s")
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def given_flags(namespace: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in msgspec.structs.fields(ServerConfig)} - set(NOT_FLAGS)
    return {name: value for name, value in vars(namespace).items() if name in names}


def _describe(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """The type without its wrappers, and its description."""
    description = ""
    while True:
        match kind:
            case inspect.Metadata(type=inner, extra_json_schema=extra):
                description = description or (extra or {}).get("description", "")
                kind = inner
            case inspect.UnionType(types=types):
                (kind,) = (t for t in types if not isinstance(t, inspect.NoneType))
            case _:
                return kind, description
