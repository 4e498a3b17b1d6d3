"""Functions come, change and go: adapters are fetched, proven in a throw-away worker, and put into the registry.

What is in the registry was proven on the very backbone that it is for. When a server starts on another one, the
versions that somebody gets are proven again beside the serving; one that does not fit any more answers with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from weakref import WeakValueDictionary

from serverlesslora.adapters.store import AdapterStore, StoredAdapter
from serverlesslora.config import FunctionConfig, ServerConfig
from serverlesslora.errors import (
    AdapterInvalid,
    ConfigError,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    ServerlessLoraError,
    Unavailable,
)
from serverlesslora.gateway.backbone_service import BackboneService
from serverlesslora.gateway.control_plane import ControlPlane
from serverlesslora.gateway.storing import is_local
from serverlesslora.gateway.worker_link import WorkerLink
from serverlesslora.gateway.workers import retired_after
from serverlesslora.registry.declared import Difference, Fetched, decide, deployed, describe, differences
from serverlesslora.registry.entries import (
    ALL,
    Entry,
    Facts,
    Version,
    rolled_back,
    routed,
    shown,
    with_canary,
    with_facts,
    without_version,
)
from serverlesslora.registry.file import Change, Contents
from serverlesslora.registry.functions import Function, Target, domain_of
from serverlesslora.registry.registry import Registry
from serverlesslora_ipc.messages import Loaded

log = logging.getLogger("serverlesslora.deployments")

INSPECTIONS_AT_ONCE = 4  # each is a worker; a server may start with a thousand functions to look at

OnStep = Callable[[str, str], None]  # a function's name, and what is done for it now


def unheard(name: str, step: str) -> None:
    pass


class Deployments:
    def __init__(
        self,
        config: ServerConfig,
        *,
        registry: Registry,
        services: Mapping[str, BackboneService],
        store: AdapterStore,
        control: ControlPlane,
    ) -> None:
        self._config = config
        self._registry = registry
        self._services = services
        self._store = store
        self._control = control
        self._by_name: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # held by who deploys
        self._inspecting = asyncio.Semaphore(INSPECTIONS_AT_ONCE)
        self._inspectors: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._inspected: dict[tuple[str, str], Loaded] = {}  # (backbone, digest): a verdict never changes
        self._unfit: dict[tuple[str, str], str] = {}  # (backbone, digest) -> why it is not served any more
        self._proving: asyncio.Task[None] | None = None
        registry.watch(self._settle)

    # --- life

    async def startup(self) -> None:
        """What was kept is there already; now what the configuration declares. Raises ConfigError for what cannot be
        served of that."""
        if self._config.functions:
            try:
                await self._declare(self._config.functions, ConfigError)
            except ConfigError:
                raise
            except ServerlessLoraError as error:
                raise ConfigError(f"the configured functions cannot be kept: {error.message}") from error
        hidden = [f"{e.name} ({e.stable.backbone})" for e in self._registry.entries.values() if not self.is_here(e)]
        if hidden:
            log.warning("kept but not served, because their backbone is not here: %s", ", ".join(hidden[:20]))
        self._proving = asyncio.create_task(self._prove_kept(), name="proving kept functions")

    async def shutdown(self) -> None:
        if self._proving is not None:
            self._proving.cancel()
            await asyncio.gather(self._proving, return_exceptions=True)
        self._registry.close()

    # --- asking

    def check(self, target: Target) -> None:
        """Raises AdapterInvalid for a function that was kept and does not fit its backbone any more."""
        if target.function is not None and (reason := self.problem(target.function)):
            raise AdapterInvalid(
                f"`{target.function.name}` v{target.function.version} does not fit the backbone "
                f"`{target.backbone.name}` that is served now: {reason}",
                param="model",
            )

    def problem(self, function: Function | Version) -> str | None:
        """Why it is not served any more."""
        return self._unfit.get((function.backbone, function.digest))

    def is_here(self, entry: Entry) -> bool:
        """A version that somebody gets is on a backbone that is served."""
        return self._registry.function(entry.name) is not None

    # --- changing

    async def deploy(
        self,
        function: FunctionConfig,
        *,
        replace: bool,
        weight: int = ALL,
        who: str = "admin API",
        on_step: OnStep = unheard,
    ) -> int:
        """Fetch the adapter, prove that it can be served, then put it under its name, for `weight` per cent; returns
        the version's number.

        Raises NotFound, AdapterInvalid, InvalidRequest (the name is taken), Unavailable or StorageFull; nothing has
        changed then.
        """
        self._registry.check_name(function.name)
        lock = self._by_name.setdefault(function.name, asyncio.Lock())
        async with lock:
            self._check_free(function.name, self._registry.contents, replace=replace)
            with contextlib.ExitStack() as held:
                fetched = await self._fetch(function, held, on_step)

                def put(contents: Contents) -> list[Change]:
                    self._check_free(function.name, contents, replace=replace)
                    before = contents.entries.get(function.name)
                    after = deployed(contents, fetched, now=int(time.time()), weight=weight)
                    return _changed(before, after, "deploy")

                await self._registry.change(put, who=who)
            version = self._registry.entry(function.name).find(fetched.digest, fetched.backbone)
            assert version is not None
            return version.number

    async def apply(
        self,
        functions: Sequence[FunctionConfig],
        *,
        dry_run: bool = False,
        prune: bool = False,
        revision: int | None = None,
        who: str = "admin API",
        on_step: OnStep = unheard,
    ) -> Difference:
        """Have what is declared, all of it or nothing. `revision`: that of the difference a person has agreed to.

        Raises Conflict when the registry is not at it any more, and as `deploy` does, naming the function.
        """
        if twice := sorted({each.name for each in functions if [f.name for f in functions].count(each.name) > 1}):
            raise InvalidRequest(f"the names {twice} are used more than once; every function needs its own")
        for each in functions:
            self._registry.check_name(each.name)
        keep = {each.name for each in self._config.functions}
        found: Difference

        def put(contents: Contents) -> list[Change]:
            nonlocal found
            if revision is not None and contents.revision != revision:
                raise Conflict("the registry was changed by somebody else since the difference was shown; look again")
            changes = decide(contents, fetched, now=int(time.time()), prune=prune, keep=keep)
            found = Difference(differences(contents, fetched, changes), contents.revision, applied=not dry_run)
            return [] if dry_run else changes

        with contextlib.ExitStack() as held:
            fetched = await self._fetch_all(functions, held, InvalidRequest, on_step)
            await self._registry.change(put, who=who)
        return found

    async def route(self, name: str, weights: Mapping[int, int], *, who: str, is_canary: bool = False) -> Entry:
        """Weights of all versions, or of some (`is_canary`). Raises ModelNotFound, NotFound, InvalidRequest,
        AdapterInvalid and Unavailable; nothing has changed then."""

        def after(entry: Entry) -> Entry:
            return with_canary(entry, weights) if is_canary else routed(entry, weights)

        return await self._reroute(name, after, "canary" if is_canary else "route", who)

    async def roll_back(self, name: str, *, to: int | None, who: str) -> Entry:
        """To a version, or to what was in force before. Raises as `route`."""
        return await self._reroute(name, lambda entry: rolled_back(entry, to), "rollback", who)

    async def remove(self, name: str, *, who: str = "admin API") -> None:
        """With all versions. Raises ModelNotFound."""

        def put(contents: Contents) -> list[Change]:
            entry = contents.entries.get(name)
            if entry is None:
                raise ModelNotFound(f"The lora adapter '{name[:200]}' cannot be found.", param="lora_name")
            return [Change(name, entry, None, "remove", f"it had {shown(entry.weights)}")]

        await self._registry.change(put, who=who)

    async def remove_version(self, name: str, number: int, *, who: str = "admin API") -> None:
        """One that nobody gets. Raises ModelNotFound, NotFound, InvalidRequest."""

        def put(contents: Contents) -> list[Change]:
            entry = _entry(contents, name)
            return [Change(name, entry, without_version(entry, number), "remove version", f"v{number}")]

        await self._registry.change(put, who=who)

    async def _reroute(self, name: str, change: Callable[[Entry], Entry], action: str, who: str) -> Entry:
        wanted = change(self._registry.entry(name))  # what cannot be is said before anything is looked at
        for number in wanted.weights:
            await self._prove(wanted, number)

        def put(contents: Contents) -> list[Change]:
            before = _entry(contents, name)
            return _changed(before, change(before), action)

        await self._registry.change(put, who=who)
        return self._registry.entry(name)

    def _settle(self, changes: Sequence[Change]) -> None:
        """Adapters that nobody gets any more leave their workers, unless another function there has the same one."""
        wanted = {(self._domain(function), function.digest) for function in self._registry.routed()}
        for change in changes:
            for function in _dropped(change):
                if function.backbone not in self._services:
                    continue
                domain = self._domain(function)
                if (domain, function.digest) not in wanted and (link := self._control.workers.find(domain)):
                    link.unload(function.digest)
                    self._control.controller.changed(link)
                if change.after is None:
                    self._control.controller.forget(function)
        self._control.controller.made_room()  # a pinned function is loaded by the next plan

    def _domain(self, function: Function) -> str:
        target = Target(self._registry.backbone(function.backbone), function)
        return domain_of(target, isolation=self._config.isolation)

    @staticmethod
    def _check_free(name: str, contents: Contents, *, replace: bool) -> None:
        if name in contents.entries and not replace:
            raise InvalidRequest(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True.",
                param="lora_name",
            )

    # --- fetching and proving

    async def _declare(self, functions: Sequence[FunctionConfig], failure: type[ServerlessLoraError]) -> None:
        with contextlib.ExitStack() as held:
            fetched = await self._fetch_all(functions, held, failure, unheard)
            await self._registry.change(
                lambda contents: decide(contents, fetched, now=int(time.time())), who="configuration"
            )

    async def _fetch_all(
        self,
        functions: Sequence[FunctionConfig],
        held: contextlib.ExitStack,
        failure: type[ServerlessLoraError],
        on_step: OnStep,
    ) -> list[Fetched]:
        async def fetch(function: FunctionConfig) -> Fetched:
            try:
                return await self._fetch(function, held, on_step)
            except ServerlessLoraError as error:
                sentence = f"function {function.name!r} cannot be served: {error.message}"
                kind = Unavailable if error.status >= 500 and failure is not ConfigError else failure
                raise kind(sentence, param=error.param, code=None if kind is ConfigError else error.code) from error

        tasks = [asyncio.ensure_future(fetch(function)) for function in functions]
        try:
            return await asyncio.gather(*tasks)
        finally:  # one failed: nothing will come of the others
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, function: FunctionConfig, held: contextlib.ExitStack, on_step: OnStep) -> Fetched:
        """What cannot be fetched again is `held` until the registry, which protects it from then on, has it."""
        backbone = self._registry.backbone(function.backbone).name
        on_step(function.name, "fetching")
        async with self._store.obtaining(function.adapter) as stored:
            if is_local(function.adapter):
                held.enter_context(self._store.hold(stored.digest))
            on_step(function.name, "inspecting")
            facts = self._known_facts(backbone, stored.digest)
            if facts is None:
                facts = facts_of(await self.inspect(backbone, stored))
        on_step(function.name, "ready")
        return Fetched(function, backbone, stored.digest, facts, self._services[backbone].identity)

    def _known_facts(self, backbone: str, digest: str) -> Facts | None:
        """What an earlier look at this content on these very weights found out, in this server's life or before."""
        identity = self._services[backbone].identity
        if identity is None or (backbone, digest) in self._unfit:
            return None
        return self._registry.facts(digest, identity)

    async def inspect(self, backbone: str, stored: StoredAdapter) -> Loaded:
        """What loading it finds out. A hostile file can hurt only the worker that was made for looking at it."""
        key = (backbone, stored.digest)
        lock = self._inspectors.setdefault(key, asyncio.Lock())
        async with lock:  # many functions of one adapter, deployed together, look at it once
            if key not in self._inspected:
                service = self._services[backbone]
                async with self._inspecting:
                    await service.wait_ready(self._config.cold_timeout_s)
                    workers = self._control.workers
                    link = await workers.start_alone(f"{backbone}/inspect:{stored.digest[:16]}", service)
                    with retired_after(workers, link):
                        self._inspected[key] = await self._load_in_time(link, stored)
                self._unfit.pop(key, None)
            return self._inspected[key]

    async def _load_in_time(self, link: WorkerLink, stored: StoredAdapter) -> Loaded:
        """A file may take for ever to load; it must not keep its place, and its name locked, for as long."""
        try:
            async with asyncio.timeout(self._config.cold_timeout_s):
                return await asyncio.shield(link.load(stored.digest, str(stored.path)))
        except TimeoutError:
            raise Unavailable(
                f"the adapter did not load within {self._config.cold_timeout_s:g} s", retry_after_s=30
            ) from None

    # --- what was kept

    async def _prove_kept(self) -> None:
        """Every version that somebody gets and that was proven on other weights than are served now."""
        kept = [(entry, number) for entry in self._registry.entries.values() for number in entry.weights]
        for entry, number in kept:
            version = entry.version(number)
            try:
                await self._prove(entry, number)
            except ServerlessLoraError as error:
                if reason := self.problem(version):
                    log.error("%s v%d does not fit %s any more: %s", entry.name, number, version.backbone, reason)
                    continue
                # Its source may be away for now; the worker that runs it will look at it as well.
                log.warning("%s v%d could not be looked at again: %s", entry.name, number, error.message)

    async def _prove(self, entry: Entry, number: int) -> None:
        """Raises AdapterInvalid for a version that does not fit, and what fetching and inspecting raise."""
        version = entry.version(number)
        service = self._services.get(version.backbone)
        if service is None or service.identity in (None, version.identity):
            return  # not here, or nothing new
        facts = self._known_facts(version.backbone, version.digest)
        if facts is None:
            with self._store.hold(version.digest):
                path = await self._store.ensure(version.digest, version.source)
                stored = StoredAdapter(version.digest, path, version.facts.size_bytes)
                try:
                    facts = facts_of(await self.inspect(version.backbone, stored))
                except AdapterInvalid as error:
                    self._unfit[(version.backbone, version.digest)] = error.message
                    raise
        identity = service.identity

        def put(contents: Contents) -> list[Change]:
            before = contents.entries.get(entry.name)
            if before is None or version not in before.versions:
                return []
            return _changed(before, with_facts(before, number, facts, identity), "inspect", f"v{number} still fits")

        with contextlib.suppress(ServerlessLoraError):  # a full disk: it is looked at again after the next start
            await self._registry.change(put, who="server")


def facts_of(loaded: Loaded) -> Facts:
    return Facts(size_bytes=loaded.size_bytes, rank=loaded.rank, modules=loaded.modules, kinds=loaded.kinds)


def _entry(contents: Contents, name: str) -> Entry:
    if name not in contents.entries:
        raise ModelNotFound(f"The function `{name[:200]}` does not exist.", param="name")
    return contents.entries[name]


def _changed(before: Entry | None, after: Entry, action: str, detail: str = "") -> list[Change]:
    if before == after:
        return []
    return [Change(after.name, before, after, action, detail or "; ".join(describe(before, after).details))]


def _dropped(change: Change) -> Iterator[Function]:
    """What was there before a change, or what somebody got, and is no longer; also what changed its tenant."""
    if change.before is None:
        return
    for version in change.before.versions:
        number, after = version.number, change.after
        if after is None or number not in {each.number for each in after.versions}:
            yield change.before.at(number)
        elif number in change.before.weights:
            moved = change.before.settings.tenant != after.settings.tenant
            if moved or number not in after.weights:
                yield change.before.at(number)
