"""Settings from environment variables: SERVERLESSLORA_PORT is `--port`, and so on for every field of the server's.

A list is separated as a PATH is; the tables `backbones`, `functions` and `tenants` are JSON.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from serverlesslora.config import ServerConfig
from serverlesslora.errors import ConfigError

PREFIX = "SERVERLESSLORA_"
CONFIG_VARIABLE = "SERVERLESSLORA_CONFIG"  # the file
TABLES = ("backbones", "functions", "tenants")
LISTS = ("adapter_roots",)


def variable_of(field: str) -> str:
    return PREFIX + field.upper()


def settings_in(environment: Mapping[str, str]) -> dict[str, Any]:
    """A layer for `build_config`, which checks the values. Raises ConfigError for JSON that is none."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(ServerConfig):
        name = variable_of(field.name)
        text = environment.get(name)
        # Kubernetes tells every container of a service called `serverlesslora` its address in a variable like ours.
        if not text or (field.name == "port" and "://" in text):
            continue
        if field.name in TABLES:
            found[field.name] = _table(name, text)
        elif field.name in LISTS:
            found[field.name] = [part for part in text.split(os.pathsep) if part]
        else:
            found[field.name] = text
    return found


def _table(name: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name} must be JSON, a list of objects: {error}") from error
