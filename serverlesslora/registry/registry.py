"""What `model` means now: names of functions and backbones, and the version that a request for one of them gets.

In memory is what is on the disk: a change is written first and seen afterwards, and what could not be written did not
happen. What is looked up is made once per change, because requests ask far more often than people deploy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from serverlesslora.errors import InvalidRequest, ModelNotFound
from serverlesslora.registry.entries import Entry, Facts, Weights, stable_of
from serverlesslora.registry.file import Change, Contents, Event, RegistryFile, Stale
from serverlesslora.registry.functions import Backbone, Function, Target
from serverlesslora.registry.names import SEPARATOR, choose, parse

Decision = Callable[[Contents], Sequence[Change]]


class _Served(NamedTuple):
    """A function of which at least one version that somebody gets is on a backbone that is here."""

    weights: Weights  # of versions whose backbone is here
    targets: dict[int, Target]  # every version whose backbone is here
    latest: int

    def pick(self, name: str, key: str | None) -> Target:
        return self.targets[stable_of(self.weights) if key is None else choose(self.weights, name, key)]

    def version(self, asked: int | str) -> Target | None:
        if isinstance(asked, str):
            asked = self.latest if asked == "latest" else stable_of(self.weights)
        return self.targets.get(asked)


class Registry:
    def __init__(self, backbones: list[Backbone], file: RegistryFile) -> None:
        """Raises ConfigError when the file is damaged."""
        self._backbones = {backbone.name: backbone for backbone in backbones}
        self._file = file
        self._changing = asyncio.Lock()
        self._on_change: Callable[[Sequence[Change]], None] = lambda changes: None
        self._served: dict[str, _Served] = {}
        self.version = 0  # counts changes, for those who keep something computed from all functions
        self._facts: dict[tuple[str, str | None], Facts] = {}
        self._facts_version = -1
        self._contents = file.load()
        self._look(self._contents.entries)

    # --- asking

    def resolve(self, name: str, key: str | None = None) -> Target:
        """Where a request for `name` goes; `key` is whoever asks, without one it is the version that most get.

        Raises ModelNotFound; an unknown name is never answered by a backbone.
        """
        if served := self._served.get(name):
            return served.pick(name, key)
        if backbone := self._backbones.get(name):
            return Target(backbone, None)
        asked = parse(name)
        if asked is not None and asked.version is not None and (served := self._served.get(asked.function)):
            target = served.version(asked.version)
            if target is not None:
                return target
        raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")

    def backbone(self, name: str | None) -> Backbone:
        """The named backbone, or the first one. Raises ModelNotFound."""
        if name is None:
            return next(iter(self._backbones.values()))
        if name not in self._backbones:
            raise ModelNotFound(f"The backbone `{name[:200]}` is not served here.", param="backbone")
        return self._backbones[name]

    def function(self, name: str) -> Function | None:
        """As the version that most get."""
        served = self._served.get(name)
        return served.pick(name, None).function if served else None

    def backbones(self) -> Iterator[Backbone]:
        yield from self._backbones.values()

    def functions(self) -> Iterator[Function]:
        """Each once, as the version that most get; as they are now, whatever changes while they are read."""
        for name, served in list(self._served.items()):
            function = served.pick(name, None).function
            assert function is not None
            yield function

    def routed(self) -> Iterator[Function]:
        """Every version that somebody gets."""
        for served in list(self._served.values()):
            for number in served.weights:
                function = served.targets[number].function
                assert function is not None
                yield function

    @property
    def num_functions(self) -> int:
        return len(self._served)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Everything that is kept, also functions whose backbone is not here now."""
        return self._contents.entries

    @property
    def contents(self) -> Contents:
        return self._contents

    def on_disk(self) -> Contents:
        """With what another server has changed since; from any thread. Blocks."""
        known = self._contents
        return known if self._file.revision() == known.revision else self._file.load()

    def entry(self, name: str) -> Entry:
        """Raises ModelNotFound."""
        entry = self.entries.get(name)
        if entry is None:
            raise ModelNotFound(f"The function `{name[:200]}` does not exist.", param="name")
        return entry

    def check_name(self, name: str) -> None:
        """Raises InvalidRequest for what a function cannot be called."""
        if name in self._backbones:
            raise InvalidRequest(f"'{name}' conflicts with a served base model.", param="lora_name")
        if SEPARATOR in name:
            raise InvalidRequest(
                f"'{name[:200]}': a function's name cannot have '{SEPARATOR}' in it, which leads to its versions.",
                param="lora_name",
            )

    def facts(self, digest: str, identity: str) -> Facts | None:
        """What was found out about this content on the weights of this identity, under whatever name."""
        if self._facts_version != self.version:
            versions = (version for entry in self.entries.values() for version in entry.versions)
            self._facts = {(each.digest, each.identity): each.facts for each in versions}
            self._facts_version = self.version
        return self._facts.get((digest, identity))

    async def history(self, name: str) -> list[Event]:
        return await asyncio.to_thread(self._file.history, name)

    # --- changing

    def watch(self, on_change: Callable[[Sequence[Change]], None]) -> None:
        """It hears of every change of this server's that came to be."""
        self._on_change = on_change

    async def change(self, decide: Decision, *, who: str) -> Sequence[Change]:
        """Carry out what `decide` makes of the present state, all of it or nothing; returns when it is on the disk.

        `decide` changes nothing itself, and is asked again when a second server has changed the file. Raises what it
        raises, and StorageFull or Unavailable when the file cannot be written.
        """
        # Whoever waits may leave; what is on the disk must be in memory all the same.
        changing = asyncio.ensure_future(self._change(decide, who))
        changing.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(changing)

    async def _change(self, decide: Decision, who: str) -> Sequence[Change]:
        async with self._changing:
            while True:
                known = self._contents
                changes = decide(known)
                if not changes:
                    return changes
                try:
                    revision = await asyncio.to_thread(self._file.write, changes, who=who, revision=known.revision)
                except Stale:
                    self._contents = await asyncio.to_thread(self._file.load)
                    self._look(known.entries.keys() | self._contents.entries.keys())
                    continue
                entries, removed = dict(known.entries), dict(known.removed)
                for change in changes:
                    if change.after is not None:
                        entries[change.name] = change.after
                    elif (gone := entries.pop(change.name, None)) is not None:
                        removed[change.name] = max(removed.get(change.name, 0), gone.last_number)
                self._contents = Contents(entries, removed, revision)
                self._look([change.name for change in changes])
                self._on_change(changes)
                return changes

    def close(self) -> None:
        self._file.close()

    def _look(self, names: Iterable[str]) -> None:
        """What is served under these names from now on."""
        for name in names:
            entry = self.entries.get(name)
            served = None if entry is None or name in self._backbones else self._serve(entry)
            if served is None:
                self._served.pop(name, None)
            else:
                self._served[name] = served
        self.version += 1

    def _serve(self, entry: Entry) -> _Served | None:
        here = {version.number: version for version in entry.versions if version.backbone in self._backbones}
        weights = {number: weight for number, weight in entry.weights.items() if number in here}
        if not weights:
            return None
        total = sum(weights.values())
        targets = {}
        for number, version in here.items():
            function = msgspec.structs.replace(entry.at(number), share=weights.get(number, 0) / total)
            targets[number] = Target(self._backbones[version.backbone], function)
        return _Served(weights, targets, entry.latest.number)
