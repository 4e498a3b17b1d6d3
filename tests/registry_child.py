"""Changes a registry at random until it is killed, and tells each change when it was told that it is done."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path

from serverlesslora.registry.entries import Entry, Version, begun, rolled_back, with_canary, with_version
from serverlesslora.registry.file import Change, Contents, RegistryFile
from serverlesslora.registry.functions import Backbone, Settings
from serverlesslora.registry.registry import Registry

NAMES = tuple("abcdefgh")


def changed(before: Entry | None, name: str, last: int, dice: random.Random) -> Entry | None:
    """None: removed."""
    if before is None:
        return begun(name, _version(last + 1, dice), Settings(tenant=dice.choice((None, "t"))))
    kind = dice.randrange(4)
    if kind == 0:
        return None
    if kind == 1 and before.previous is not None:
        return rolled_back(before)
    grown = with_version(before, _version(before.last_number + 1, dice))
    return with_canary(grown, {grown.last_number: dice.randint(0, 100)})


def decide(contents: Contents, dice: random.Random) -> list[Change]:
    """Several functions at once: all of them or none."""
    changes = []
    for name in dice.sample(NAMES, dice.randint(1, 4)):
        before = contents.entries.get(name)
        changes.append(Change(name, before, changed(before, name, contents.removed.get(name, 0), dice), "change", ""))
    return changes


def _version(number: int, dice: random.Random) -> Version:
    return Version(number=number, digest=f"{dice.getrandbits(64):x}", source="/a", backbone="base", created=0)


def run(path: Path, seed: int, out: int) -> None:
    """Writes the revision and what the registry holds to a descriptor, after each change."""
    registry = Registry([Backbone(name="base", source="", dtype="float32", created=0)], RegistryFile(path))
    dice = random.Random(seed)
    os.write(out, b"ready\n")
    while True:
        asyncio.run(registry.change(lambda contents: decide(contents, dice), who="child"))
        os.write(out, f"{registry.contents.revision} {held_by(registry.entries)}\n".encode())


def held_by(entries: Mapping[str, Entry]) -> str:
    return hashlib.sha256(repr(sorted(entries.items())).encode()).hexdigest()
