"""What is done at coarse intervals: plans of the preloader, idle containers, how many devices hold a backbone."""

from __future__ import annotations

import math

from serverlesslora.scheduler.artifacts import Artifact, Move, Place
from serverlesslora.scheduler.policies import Policies
from serverlesslora.scheduler.settings import PolicySettings
from serverlesslora.simulator.device import Worker
from serverlesslora.simulator.fleet import Fleet
from serverlesslora.simulator.routing import Router

BUSIER = 3.0  # bursts may keep so many times more workers busy than the last interval did on average
OPEN = "open"  # the artifact of what an open device holds besides workers
CONTAINER_SHARE = 0.9  # of a host's memory, for idle containers with a model in each


class Planner:
    def __init__(self, fleet: Fleet, router: Router, policies: Policies, settings: PolicySettings) -> None:
        self._fleet = fleet
        self._router = router
        self._policies = policies
        self._settings = settings
        self._active_s = 0.0
        self._planned_at = 0.0
        self.num_plans = 0
        self.num_moves = 0

    def plan(self, now: float) -> None:
        self.num_plans += 1
        if self._fleet.system.sharing:
            self._resize(now)
        if self._fleet.system.start == "container":
            self._fill_containers(now)
        if self._settings.preload == "on":
            self._preload(now)
        self._planned_at = now

    def start_ahead(self, domain: int, now: float) -> None:
        spot = self._router.place(domain, 0)
        if spot is not None and self._fleet.start(domain, spot.device, now) is not None:
            self._fleet.num_ahead += 1

    # --- how many devices hold the shared backbone

    def _resize(self, now: float) -> None:
        """Enough that the busy workers of the last interval, times BUSIER, leave each other half of the SLO.

        Growing is left to requests, which know better; this gives back. One device more than needed is tolerated, so
        that a copy is not loaded and dropped by turns.
        """
        devices = self._fleet.devices
        for device in devices:
            device.advance(now)
        active_s = sum(device.active_s for device in devices)
        busy = (active_s - self._active_s) / (now - self._planned_at) if now > self._planned_at else 0.0
        self._active_s = active_s
        wanted = max(1, math.ceil(BUSIER * busy / self._router.crowd))
        holding = [device for device in devices if device.is_open and not device.closing]
        if len(holding) <= wanted + 1:
            return
        last = min(holding, key=lambda device: (len(device.workers), device.num_active, -device.index))
        last.closing = True
        for worker in [worker for worker in last.workers.values() if not worker.open and worker.serving]:
            self._fleet.retire(worker, now)
        if last.closing and not last.workers:
            self._fleet.starts.close(last, now)

    # --- idle containers of systems that prepare them

    def _fill_containers(self, now: float) -> None:
        """The most wanted functions, as many as the hosts' memory holds; a model in each."""
        fleet = self._fleet
        each = fleet.profile.process_bytes + fleet.backbone.size_bytes + fleet.adapter_bytes
        rates = [(fleet.rate(f, now), -f) for f in range(len(fleet.functions.names))]
        wanted = [-f for rate, f in sorted(rates, reverse=True) if rate > 0]
        for index, host in enumerate(fleet.hosts):
            room = int(CONTAINER_SHARE * host.capacity) // each
            chosen = {fleet.functions.domain[f] for f in wanted[index * room : (index + 1) * room]}
            change = len(chosen) - len(host.containers)
            # What was the system's page cache gives way to containers.
            while host.adapters and host.used + change * each > host.capacity:
                host.hold(-host.adapters.pop(next(iter(host.adapters))), now)
            host.hold(change * each, now)
            host.containers = chosen

    # --- the knapsack

    def _preload(self, now: float) -> None:
        fleet = self._fleet
        artifacts, owners = self._catalogue(now)
        places = [
            Place(f"device:{device.index}", "device", device.capacity)
            for device in fleet.devices
            if not device.closing and (device.is_open or not fleet.system.sharing)
        ]
        placed: dict[str, list[str]] = {}
        in_use: set[tuple[str, str]] = set()
        for place in places:
            device = fleet.devices[int(place.place_id.partition(":")[2])]
            here = placed[place.place_id] = [OPEN] if device.is_open else []
            for worker in device.workers.values():
                here.append(f"worker:{worker.domain}")
                if worker.open or not worker.serving:
                    in_use.add((place.place_id, here[-1]))
                for function in worker.adapters:
                    here.append(f"adapter:{function}")
                    if worker.users.get(function):
                        in_use.add((place.place_id, here[-1]))
        plan = self._policies.preloader.plan(places, artifacts, placed, now=now, in_use=in_use, explain=False)
        for move in plan.moves:
            if self._carry_out(move, owners[move.artifact_id], now):
                self.num_moves += 1
                self._policies.preloader.moved(move.artifact_id, move.place_id, now)

    def _catalogue(self, now: float) -> tuple[list[Artifact], dict[str, tuple[int, int | None]]]:
        """Everything a device can hold, with owners as (domain, function); what is neither there nor worth it is not
        listed, as the planner's time grows with the square of the list."""
        fleet = self._fleet
        functions, arrivals = fleet.functions, self._policies.arrivals
        system = fleet.system
        least = self._settings.min_gain_per_gb / 1e9
        own = fleet.process_bytes + (0 if system.sharing else fleet.backbone.size_bytes)
        profile, size = fleet.profile, fleet.adapter_bytes
        disk_s = profile.adapter_s + size * profile.adapter_byte_s
        ram_s = profile.adapter_ram_s + size * profile.adapter_ram_byte_s
        in_ram = {function for host in fleet.hosts for function in host.adapters}
        artifacts: list[Artifact] = []
        owners: dict[str, tuple[int, int | None]] = {}
        total = 0.0
        for domain, members in enumerate(functions.members):
            here = fleet.workers[domain]
            rates = [fleet.rate(function, now) for function in members]
            rate = sum(rates)
            total += rate
            start_s = fleet.starts.again_s(domain, now)
            if not here and (domain in fleet.asleep or rate * start_s / own < least):
                continue
            copies = max(1, len(here))
            name = f"worker:{domain}"
            owners[name] = (domain, None)
            needs = (OPEN,) if system.sharing else ()
            used = max((worker.idle_since for worker in here), default=-math.inf)
            artifacts.append(Artifact(name, "worker", "device", own, start_s, rate, needs, copies, False, used))
            resident = {function for worker in here for function in worker.adapters}
            for function, expected in zip(members, rates, strict=True):
                # What leaves a device stays in its host's memory, and comes back from there.
                delay_s = ram_s if function in resident or function in in_ram else disk_s
                if function in resident or expected * delay_s / size >= least:
                    adapter = f"adapter:{function}"
                    owners[adapter] = (domain, function)
                    last = arrivals.last_seen(functions.names[function])
                    artifacts.append(
                        Artifact(
                            adapter,
                            "adapter",
                            "device",
                            size,
                            delay_s,
                            expected,
                            (name,),
                            copies,
                            False,
                            -math.inf if last is None else last,
                        )
                    )
        if system.sharing:
            copies = max(1, sum(device.is_open and not device.closing for device in fleet.devices))
            held, delay_s = fleet.open_bytes, fleet.backbone.copy_s
            artifacts.append(Artifact(OPEN, "backbone", "device", held, delay_s, total, copies=copies, pinned=True))
            owners[OPEN] = (-1, None)
        elif copies := sum(device.is_open for device in fleet.devices):
            artifacts.append(Artifact(OPEN, "process", "device", fleet.open_bytes, 1.0, 1.0, (), copies, True))
            owners[OPEN] = (-1, None)
        return artifacts, owners

    def _carry_out(self, move: Move, owner: tuple[int, int | None], now: float) -> bool:
        """What has become impossible since the plan was made is left out; the next plan sees it."""
        fleet = self._fleet
        domain, function = owner
        device = fleet.devices[int(move.place_id.partition(":")[2])]
        worker: Worker | None = device.workers.get(domain)
        if domain < 0:
            return False
        if function is None:
            if move.action == "load":
                if worker is not None or fleet.worker_bytes(device) > device.free:
                    return False
                fleet.start(domain, device, now)
                fleet.num_ahead += 1
                return True
            if worker is None or worker.open or not worker.serving:
                return False
            fleet.retire(worker, now)
            return True
        if worker is None:
            return False
        if move.action == "load":
            if function in worker.adapters or fleet.adapter_bytes > device.free:
                return False
            delay_s, _ = fleet.adapter_delay_s(worker, function)
            fleet.take(worker, fleet.adapter_bytes, now)
            worker.adapters[function] = max(now, worker.ready_at) + delay_s
            return True
        if function not in worker.adapters or worker.users.get(function):
            return False
        fleet.drop_adapter(worker, function, now)
        return True
