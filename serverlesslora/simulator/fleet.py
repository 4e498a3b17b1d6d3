"""Devices and the workers on them: how workers come and go, what they hold, and what leaves to make room."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

from serverlesslora.scheduler.artifacts import Artifact, Place
from serverlesslora.scheduler.policies import Policies
from serverlesslora.simulator.calendar import IDLE, READY, WAKE, Calendar
from serverlesslora.simulator.cluster import Cluster
from serverlesslora.simulator.device import Device, Host, Worker
from serverlesslora.simulator.starting import Starts
from serverlesslora.simulator.systems import System

HOST_SHARE_FOR_ADAPTERS = 0.25  # of a host's memory, for adapters that left a device
ASK_AGAIN_S = 0.5  # a device that could not give enough is not asked again before, unless a worker became idle
RATES_HOLD_S = 60.0  # a function's rate is not computed again before
SLACK = 0.04  # of a device's memory freed beyond what was asked, so that the next request need not ask again


class Functions:
    """The functions of a trace as one system groups them into domains; all lists are indexed by function or domain."""

    def __init__(self, names: Sequence[str], tenants: Sequence[str], system: System) -> None:
        self.names = tuple(names)
        groups = {"tenant": list(tenants), "function": list(names), "all": [""] * len(names)}[system.unit]
        dense = {group: index for index, group in enumerate(dict.fromkeys(groups))}
        self.domain = [dense[group] for group in groups]
        self.members: list[list[int]] = [[] for _ in dense]
        for function, domain in enumerate(self.domain):
            self.members[domain].append(function)
        self.names_of = [tuple(self.names[f] for f in members) for members in self.members]
        self.tenants = tuple(tenants)


class Fleet:
    def __init__(
        self,
        cluster: Cluster,
        system: System,
        functions: Functions,
        policies: Policies,
        calendar: Calendar,
        on_gone: Callable[[Worker], None],
    ) -> None:
        config, profile = cluster.config, cluster.profile
        self.system = system
        self.sharing = system.sharing
        self.functions = functions
        self.policies = policies
        self.config = config
        self.profile = profile
        self.backbone = profile.backbones[cluster.backbone]
        self.steps = self.backbone.steps
        self.adapter_bytes = config.functions.adapter_bytes
        self._calendar = calendar
        self._on_gone = on_gone
        per_host = config.hosts.devices_each
        num_hosts = -(-config.devices.count // per_host)
        self.hosts = [Host(index, int(config.hosts.memory_gb * 1e9)) for index in range(num_hosts)]
        capacity = int(config.devices.memory_gb * 1e9)
        self.devices = [
            Device(index, capacity, self.hosts[index // per_host], self.steps) for index in range(config.devices.count)
        ]
        self.workers: list[list[Worker]] = [[] for _ in functions.members]  # by domain
        self.asleep: set[int] = set()  # domains let go for idleness: plans leave them alone until somebody starts them
        self._rates: list[tuple[float, float]] = [(0.0, -RATES_HOLD_S)] * len(functions.names)  # (rate, as of)
        self.num_starts = 0
        self.num_ahead = 0  # of them, before any request asked
        self.num_moved_out = 0
        self.starts = Starts(
            system,
            profile,
            self.backbone,
            devices=self.devices,
            hosts=self.hosts,
            warm_pool=config.warm_pool,
            refill_s=config.refill_s,
        )
        self.process_bytes = self.starts.process_bytes
        self.open_bytes = self.starts.open_bytes
        # A profile without times for it was measured where devices compute in the host's own memory.
        self._has_host_tier = profile.adapter_ram_s > 0 or profile.adapter_ram_byte_s > 0
        if config.started and system.sharing:
            first = self.devices[0]
            self.starts.open(first, 0.0)
            first.backbone_at = first.launcher_at = 0.0
            first.spares = [0.0] * len(first.spares)

    # --- life of workers

    def worker_bytes(self, device: Device) -> int:
        """What a new worker takes there at once."""
        own = self.process_bytes + (0 if self.sharing else self.backbone.size_bytes)
        return own + (0 if device.is_open else self.open_bytes)

    def start(self, domain: int, device: Device, now: float, more_bytes: int = 0) -> Worker | None:
        """A worker that becomes ready later; None where there is no room for it and `more_bytes`, after all."""
        if not self.make_room(device, self.worker_bytes(device) + more_bytes, now):
            return None
        waits_for_backbone = self.starts.waits_for_backbone(device, now)
        self.asleep.discard(domain)
        at = self.starts.begin(domain, device, now)
        num_bytes = self.process_bytes + (0 if self.sharing else self.backbone.size_bytes)
        worker = Worker(domain, device, num_bytes, now, at)
        worker.waits = "backbone" if waits_for_backbone else "worker"
        worker.is_extra = bool(self.workers[domain])
        self._adopt(worker, now)
        self._calendar.add(at, READY, worker)
        return worker

    def install(self, domain: int, device: Device, share: float | None) -> Worker | None:
        """An always-on worker, serving from time zero and with its memory already held."""
        own = self.process_bytes + self.backbone.size_bytes
        num_bytes = own if share is None else int(share * device.capacity)
        if num_bytes < own or max(num_bytes, own + self.adapter_bytes) > device.free:
            return None
        worker = Worker(domain, device, num_bytes, 0.0, 0.0)
        if share is not None:
            worker.budget = num_bytes - own
            worker.blocked = deque()
            device.queues.append(worker.blocked)
        worker.serving = True
        self._adopt(worker, 0.0)
        return worker

    def _adopt(self, worker: Worker, now: float) -> None:
        self.num_starts += 1
        worker.device.hold(worker.bytes, now)
        worker.device.workers[worker.domain] = worker
        self.workers[worker.domain].append(worker)

    def retire(self, worker: Worker, now: float, *, for_another: bool = False) -> None:
        """It leaves at once; its adapters stay in host memory as long as there is room. With it goes what its device
        keeps open for workers alone, unless it leaves for another one there."""
        assert not worker.open and not worker.is_gone
        device = worker.device
        worker.is_gone = True
        worker.serving = False
        del device.workers[worker.domain]
        self.workers[worker.domain].remove(worker)
        if self.system.settings.offload == "on":
            for function in worker.adapters:
                self._to_host(device.host, function, now)
        device.hold(-(worker.bytes + (worker.inner if worker.budget is None else 0)), now)
        if not device.workers and not for_another and device.is_open and (device.closing or not self.sharing):
            self.starts.close(device, now)
        self._on_gone(worker)

    def _to_host(self, host: Host, function: int, now: float) -> None:
        if not self._has_host_tier:
            return
        if function in host.adapters:
            host.adapters[function] = host.adapters.pop(function)  # newest use last
            return
        limit = int(HOST_SHARE_FOR_ADAPTERS * host.capacity) // self.adapter_bytes
        while len(host.adapters) >= max(1, limit):
            host.hold(-host.adapters.pop(next(iter(host.adapters))), now)
        if host.used + self.adapter_bytes <= host.capacity:
            host.adapters[function] = self.adapter_bytes
            host.hold(self.adapter_bytes, now)

    def went_idle(self, worker: Worker, now: float) -> None:
        worker.idle_since = now
        worker.device.asked_at = -math.inf
        if self.system.life == "elastic" and not worker.is_armed:
            worker.is_armed = True
            self._calendar.add(now + self.system.settings.keep_alive_min_s, IDLE, worker)

    def look_at_idle(self, worker: Worker, now: float) -> bool:
        """Its entry in the calendar is due: let it go, or look again later. Says whether it went."""
        worker.is_armed = False
        if worker.open or worker.is_gone:
            return False
        names = self.functions.names_of[worker.domain]
        minimum = self.system.settings.keep_alive_min_s
        at = worker.idle_since + minimum
        if at <= now and not worker.is_extra and not worker.device.closing:
            wait = self.policies.keep_alive.idle_timeout(
                names,
                now,
                idle_since=worker.idle_since,
                size_bytes=worker.bytes + worker.inner,
                delay_s=self.starts.again_s(worker.domain, now),
            )
            at = worker.idle_since + wait.seconds
        if at > now:
            worker.is_armed = True
            self._calendar.add(at, IDLE, worker)
            return False
        is_last = len(self.workers[worker.domain]) == 1
        held_bytes = worker.bytes + worker.inner
        self.retire(worker, now)
        if is_last:
            self.asleep.add(worker.domain)
            again_s = self.starts.again_s(worker.domain, now)
            again = self.policies.keep_alive.wake_in(names, now, size_bytes=held_bytes, delay_s=again_s)
            if again is not None:
                self._calendar.add(now + again.seconds, WAKE, worker.domain)
        return True

    # --- memory

    def idle_bytes(self, device: Device) -> int:
        """What leaves for somebody who needs room, roughly: workers without requests."""
        if self.system.settings.offload == "off":
            return 0
        idle = (worker for worker in device.workers.values() if worker.serving and not worker.open)
        return sum(worker.bytes + worker.inner for worker in idle)

    def take(self, worker: Worker, num_bytes: int, now: float) -> bool:
        """Memory for an adapter or KV, or no change."""
        if worker.budget is not None:
            if worker.inner + num_bytes > worker.budget and not self._drop_adapters(worker, num_bytes, now):
                return False
        elif not self.make_room(worker.device, num_bytes, now):
            return False
        else:
            worker.device.hold(num_bytes, now)
        worker.inner += num_bytes
        return True

    def give(self, worker: Worker, num_bytes: int, now: float) -> None:
        worker.inner -= num_bytes
        if worker.budget is None:
            worker.device.hold(-num_bytes, now)

    def _drop_adapters(self, worker: Worker, num_bytes: int, now: float) -> bool:
        """Inside a process with memory of its own: least recently used first, as every engine's adapter cache."""
        assert worker.budget is not None
        for function in [f for f in worker.adapters if not worker.users.get(f)]:
            if worker.inner + num_bytes <= worker.budget:
                break
            self.drop_adapter(worker, function, now)
        return worker.inner + num_bytes <= worker.budget

    def drop_adapter(self, worker: Worker, function: int, now: float) -> None:
        del worker.adapters[function]
        self.give(worker, self.adapter_bytes, now)
        self._to_host(worker.device.host, function, now)

    def adapter_delay_s(self, worker: Worker, function: int) -> tuple[float, str]:
        """Seconds until it is on the device, and the rung that this is."""
        profile = self.profile
        if function in worker.device.host.adapters or function in worker.device.host.containers:
            return profile.adapter_ram_s + self.adapter_bytes * profile.adapter_ram_byte_s, "adapter-ram"
        return profile.adapter_s + self.adapter_bytes * profile.adapter_byte_s, "adapter-disk"

    def make_room(self, device: Device, num_bytes: int, now: float) -> bool:
        """Whether so many bytes are free, after moving out what the policy gives up for them."""
        missing = num_bytes - device.free
        if missing <= 0:
            return True
        if self.system.settings.offload == "off" or self.system.life == "always":
            return False
        if missing > device.can_give and now < device.asked_at + ASK_AGAIN_S:
            return False
        artifacts, in_use, owners = self._on_device(device, now)
        plan = self.policies.offloader.free(
            Place(f"device:{device.index}", "device", device.capacity),
            artifacts,
            missing + int(SLACK * device.capacity),
            in_use=in_use,
            reason="a request needs room",
        )
        if plan.freed_bytes < missing:
            device.can_give, device.asked_at = plan.freed_bytes, now
            return False
        for eviction in plan.evictions:
            worker, function = owners[eviction.artifact_id]
            self.num_moved_out += 1
            if function is None:
                self.retire(worker, now, for_another=True)
            elif function in worker.adapters and not worker.is_gone:
                self.drop_adapter(worker, function, now)
        return num_bytes <= device.free

    def rate(self, function: int, now: float) -> float:
        """Requests per second that are expected, not older than a moment."""
        rate, at = self._rates[function]
        if now - at >= RATES_HOLD_S:
            rate = self.policies.arrivals.rate(self.functions.names[function], now)
            self._rates[function] = (rate, now)
        return rate

    def _on_device(
        self, device: Device, now: float
    ) -> tuple[list[Artifact], set[str], dict[str, tuple[Worker, int | None]]]:
        """What lies there, as the policies see it; adapters lie with their worker, a worker on its backbone."""
        names = self.functions.names
        artifacts: list[Artifact] = []
        in_use: set[str] = set()
        owners: dict[str, tuple[Worker, int | None]] = {}
        parents: tuple[str, ...] = ()
        if device.is_open:
            artifacts.append(Artifact("open", "backbone", "device", self.open_bytes, 1.0, 1.0, pinned=True))
            parents = ("open",)
        for worker in device.workers.values():
            owner = f"worker:{worker.domain}"
            owners[owner] = (worker, None)
            total = 0.0
            if worker.open or not worker.serving:
                in_use.add(owner)
            for function in worker.adapters:
                adapter = f"adapter:{worker.domain}:{function}"
                owners[adapter] = (worker, function)
                expected = self.rate(function, now)
                total += expected
                last = self.policies.arrivals.last_seen(names[function])
                if worker.users.get(function):
                    in_use.add(adapter)
                delay, _ = self.adapter_delay_s(worker, function)
                used = -1.0 if last is None else last
                artifacts.append(
                    Artifact(
                        adapter, "adapter", "device", self.adapter_bytes, delay, expected, (owner,), last_used=used
                    )
                )
            delay = self.starts.again_s(worker.domain, now)
            artifacts.append(
                Artifact(owner, "worker", "device", worker.bytes, delay, total, parents, last_used=worker.idle_since)
            )
        return artifacts, in_use, owners
