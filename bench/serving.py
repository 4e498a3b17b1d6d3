"""A server with many functions for the benches of the control plane: one command line from a model and its settings."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import MODELS, Running, admin_get, require_models, server
from serverlesslora.demo import adapter_paths, backbone_path

NICE = 5  # client and server share the cores, and the client has to keep its times

Settings = Mapping[str, str | float]  # flag without its dashes → value


@dataclass(frozen=True)
class Model:
    """A backbone of the benches, with adapters that many functions may share the files of."""

    name: str
    backbone: Path
    adapters: tuple[Path, ...]
    token_ids: tuple[int, int]  # prompts are drawn from [low, high)
    max_tokens: int  # of prompt and output together


def find_model(name: str) -> Model:
    """`demo`, or a shape written by `make_models.py`."""
    if name == "demo":
        return Model(name, backbone_path(), tuple(adapter_paths().values()), (97, 123), 1024)
    backbone = require_models(name)
    adapters = tuple(sorted((MODELS / f"{name}-lora").iterdir()))
    return Model(name, backbone, adapters, (300, 4000), 4096)


def function_names(count: int) -> list[str]:
    return [f"f{i:02d}" for i in range(count)]


@dataclass(frozen=True)
class Deployed:
    running: Running
    model: Model
    functions: tuple[str, ...]
    settings: dict[str, str | float]  # what the server was told
    unknown: tuple[str, ...]  # flags that this server does not have and was not told

    def state(self) -> Any:
        return admin_get(self.running, "/admin/state")

    def workers(self) -> int:
        return len(self.state()["workers"])

    def device_seconds(self) -> float:
        """Shares of device steps of all finished requests so far."""
        with urllib.request.urlopen(f"{self.running.url}/metrics", timeout=10) as answer:
            page: str = answer.read().decode()
        return sum(float(value) for value in re.findall(r"(?m)^serverlesslora_device_seconds_total\S* (\S+)$", page))

    def usage(self, **query: str | float) -> Any:
        """The server's own ledger; None where it has none."""
        text = "&".join(f"{key}={value}" for key, value in {**query, "format": "json"}.items())
        try:
            return admin_get(self.running, f"/admin/usage?{text}")
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None


@functools.cache
def known_flags() -> frozenset[str]:
    text = subprocess.run(
        [sys.executable, "-m", "serverlesslora", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    return frozenset(re.findall(r"--([a-z][a-z0-9-]*)", text))


@contextlib.contextmanager
def deployment(
    model: Model,
    functions: Sequence[str],
    settings: Settings,
    *,
    tenants: Mapping[str, str] | None = None,
) -> Iterator[Deployed]:
    """The functions take the adapters in turn; each is a domain of its own unless `tenants` names its tenant.

    Flags that the server does not know are left out and named: an older server can be measured with the same bench.
    """
    flags = [f"base={model.backbone}"]
    for number, name in enumerate(functions):
        owner = f"{tenants[name]}/" if tenants and name in tenants else ""
        flags += ["--adapter", f"{owner}{name}={model.adapters[number % len(model.adapters)]}"]
    told = {name: value for name, value in settings.items() if name in known_flags()}
    for name, value in told.items():
        flags += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    with server(*flags, nice=NICE) as running:
        yield Deployed(running, model, tuple(functions), dict(told), tuple(sorted(set(settings) - set(told))))
