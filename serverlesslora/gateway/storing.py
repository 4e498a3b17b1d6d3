"""The adapter store of a server: made from its configuration, and told what the server needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from serverlesslora.adapters.hosts import parse_hosts
from serverlesslora.adapters.quota import Needed
from serverlesslora.adapters.sources import parse_source
from serverlesslora.adapters.store import AdapterStore
from serverlesslora.config import ServerConfig
from serverlesslora.errors import AdapterInvalid
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.registry.registry import Registry


def create_store(config: ServerConfig, needed: Callable[[], Needed]) -> AdapterStore:
    """Raises ConfigError."""
    return AdapterStore(
        Path(config.state_dir) / "adapters",
        max_bytes=config.max_adapter_mb << 20,
        roots=[Path(root) for root in config.adapter_roots],
        kinds=config.allowed_sources,
        hosts=parse_hosts(config.adapter_hosts),
        quota_bytes=config.adapter_store_mb << 20 if config.adapter_store_mb is not None else None,
        fetch_timeout_s=config.adapter_fetch_timeout_s,
        needed=needed,
    )


def needed_by(registry: Registry, workers: Iterable[WorkerLink]) -> Needed:
    """Of versions that came from a directory all must stay, because nobody promises that it is still there, or still
    the same. What can be fetched again may leave unless it lies in a worker or is pinned.

    Asked of the file, not of this server's memory: another one that shares the store may have deployed since. Blocks.
    """
    in_use = {digest for link in workers if link.is_usable for digest in link.adapters}
    deployed = set()
    for entry in registry.on_disk().entries.values():
        for version in entry.versions:
            is_routed = version.number in entry.weights
            if is_local(version.source) or (is_routed and entry.settings.pinned):
                in_use.add(version.digest)
            if is_routed:
                deployed.add(version.digest)
    return Needed(frozenset(in_use), frozenset(deployed))


def is_local(source: str) -> bool:
    """What is in the store of it may be all there is."""
    try:
        return parse_source(source).kind == "local"
    except AdapterInvalid:  # kept by a server that knew more kinds
        return False
