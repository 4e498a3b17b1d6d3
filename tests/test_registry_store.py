"""The registry's file against a simple model, and against kill -9 at any moment."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serverlesslora.errors import ServerlessLoraError
from serverlesslora.registry.declared import Declared, Fetched, decide
from serverlesslora.registry.entries import Facts, rolled_back, with_canary, without_version
from serverlesslora.registry.file import Change, Contents, RegistryFile
from serverlesslora.registry.functions import Backbone
from serverlesslora.registry.registry import Registry
from tests import registry_child

BASE = Backbone(name="base", source="", dtype="float32", created=0)
ROUNDS = 40

names = st.sampled_from(["f", "g", "t/h"])
digests = st.sampled_from(["d1", "d2", "d3"])


class Model:
    """What a function must be, the slow and obvious way."""

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}
        self.weights: dict[int, int] = {}
        self.previous: dict[int, int] | None = None

    def route(self, weights: dict[int, int]) -> None:
        weights = {number: weight for number, weight in weights.items() if weight}
        if weights != self.weights:
            self.previous, self.weights = self.weights or None, weights


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        self.path = Path(self._scratch.name) / "registry.sqlite"
        self.registry = Registry([BASE], RegistryFile(self.path))
        self.models: dict[str, Model] = {}
        self.last: dict[str, int] = {}
        self.num_changes = 0

    def teardown(self) -> None:
        self.registry.close()
        self._scratch.cleanup()

    def change(self, put: Any) -> None:
        changes = asyncio.run(self.registry.change(put, who="test"))
        self.num_changes += len(changes)

    @rule(name=names, digest=digests)
    def declare(self, name: str, digest: str) -> None:
        fetched = Fetched(Declared(name=name, adapter="/a"), "base", digest, Facts(rank=4), None)
        self.change(lambda contents: decide(contents, [fetched], now=0))
        model = self.models.setdefault(name, Model())
        known = [number for number, each in model.digests.items() if each == digest]
        if known:
            number = max(known)
        else:
            number = self.last[name] = self.last.get(name, 0) + 1
            model.digests[number] = digest
        if number not in model.weights:
            model.route({number: 100})

    @rule(name=names, number=st.integers(1, 4), weight=st.integers(0, 100))
    def canary(self, name: str, number: int, weight: int) -> None:
        model = self.models.get(name)
        if model is None or number not in model.digests:
            return
        others = {each: w for each, w in model.weights.items() if each != number}
        if not others:
            others = {each: 1 for each in model.digests if each != number}
        if not others and weight != 100:
            return
        weights = {number: weight}
        if weight != 100:
            weights[max(others, key=lambda each: (others[each], each))] = 100 - weight
        self._replace(name, lambda entry: with_canary(entry, {number: weight}))
        model.route(weights)

    @rule(name=names)
    def roll_back(self, name: str) -> None:
        model = self.models.get(name)
        if model is not None and model.previous is not None:
            self._replace(name, rolled_back)
            model.route(model.previous)

    @rule(name=names, number=st.integers(1, 4))
    def remove_version(self, name: str, number: int) -> None:
        model = self.models.get(name)
        if model is None or number not in model.digests or number in model.weights:
            return
        self._replace(name, lambda entry: without_version(entry, number))
        del model.digests[number]
        if model.previous is not None and number in model.previous:
            model.previous = None

    @rule(name=names)
    def remove(self, name: str) -> None:
        if self.models.pop(name, None) is not None:
            self.change(lambda contents: [Change(name, contents.entries[name], None, "remove", "")])

    @rule(name=names)
    def fail(self, name: str) -> None:
        """A change that cannot be written, of several functions."""
        db = self.registry._file._db
        db.execute("PRAGMA query_only = 1")
        fetched = [Fetched(Declared(name=n, adapter="/a"), "base", "new", Facts(), None) for n in ("f", "g")]
        with pytest.raises(ServerlessLoraError, match="read-only"):
            self.change(lambda contents: decide(contents, fetched, now=0))
        db.execute("PRAGMA query_only = 0")

    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.registry = Registry([BASE], RegistryFile(self.path))

    def _replace(self, name: str, change: Any) -> None:
        def put(contents: Contents) -> list[Change]:
            before = contents.entries[name]
            after = change(before)
            return [] if after == before else [Change(name, before, after, "", "")]

        self.change(put)

    @invariant()
    def memory_is_as_the_model(self) -> None:
        assert self.registry.entries.keys() == self.models.keys()
        for name, model in self.models.items():
            entry = self.registry.entries[name]
            entry.check()
            assert {each.number: each.digest for each in entry.versions} == model.digests
            assert (entry.weights, entry.previous) == (model.weights, model.previous)
            assert self.registry.resolve(name).digest in model.digests.values()
        assert self.registry.contents.revision == self.num_changes

    @invariant()
    def the_disk_is_as_memory(self) -> None:
        other = RegistryFile(self.path)
        assert other.load() == self.registry.contents
        other.close()


TestRegistry = Machine.TestCase
TestRegistry.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)


def run_and_kill(path: Path, seed: int, after_s: float) -> list[str]:
    """A process that changes the registry, killed so long after it began to; what it was told to be done."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # not a new interpreter: forty of them would take a minute
        try:
            registry_child.run(path, seed, write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as out:
        assert out.readline() == "ready\n"
        timer = threading.Timer(after_s, os.kill, (pid, signal.SIGKILL))
        timer.start()
        lines = out.read().splitlines(keepends=True)
        timer.join()
    os.waitpid(pid, 0)
    return [line for line in lines if line.endswith("\n")]  # the last may be half a line


def test_kill_9_at_any_moment_leaves_whole_changes_and_all_that_were_told(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    dice = random.Random(7)
    acknowledged = 0
    for number in range(ROUNDS):
        told = run_and_kill(path, seed=number, after_s=dice.uniform(0.0, 0.15))
        acknowledged += len(told)
        file = RegistryFile(path)
        contents = file.load()  # checks every entry
        file.close()
        if not told:
            continue
        revision, held = told[-1].split()
        if contents.revision == int(revision):
            assert registry_child.held_by(contents.entries) == held
        else:  # one more may be on the disk, whose child did not live to tell; it is whole or not there
            assert int(revision) < contents.revision <= int(revision) + 4
            replayed = {line.split()[0] for line in told}
            assert str(contents.revision) not in replayed
    assert acknowledged > ROUNDS  # the race was on


def test_two_servers_that_start_at_once_make_one_file(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    failures: list[BaseException] = []

    def start() -> None:
        try:
            RegistryFile(path).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
