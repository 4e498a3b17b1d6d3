"""What a start takes: when a worker would serve, which spares and launchers wait where, and what they hold.

A device that a system forks workers on has a launcher while it is open: one that shares, while it holds the backbone;
one that does not, while it has a worker. Opening it begins the launcher, which first imports its libraries, as every
fresh process does; nothing can be forked before that, and no launcher waits on a closed device. A fork takes
`worker_s`, while the backbone is being loaded if need be; spares are made after both, as they compute with it. A
private spare has made its copy while nobody waited; what that copy holds is not counted, in favour of systems without
sharing.
"""

from __future__ import annotations

from collections.abc import Sequence

from serverlesslora.scheduler.profile import BackboneProfile, Profile
from serverlesslora.simulator.device import Device, Host
from serverlesslora.simulator.systems import System


class Starts:
    def __init__(
        self,
        system: System,
        profile: Profile,
        backbone: BackboneProfile,
        *,
        devices: Sequence[Device],
        hosts: Sequence[Host],
        warm_pool: int,
        refill_s: float,
    ) -> None:
        self._system = system
        self._profile = profile
        self._backbone = backbone
        self._devices = devices
        self._hosts = hosts
        self._refill_s = refill_s
        self.forks = system.start == "fork"
        self.num_spares = warm_pool if self.forks else 0
        self.process_bytes = profile.worker_bytes if self.forks else profile.process_bytes
        # What opening a device takes at once, and closing it gives back.
        self.open_bytes = self.num_spares * profile.worker_bytes + (backbone.size_bytes if system.sharing else 0)

    @property
    def opens(self) -> bool:
        """Whether devices are opened and closed: not where every worker is a process that shares nothing."""
        return self._system.sharing or self.forks

    # --- estimates, which change nothing

    def ready_at(self, domain: int, device: Device, now: float) -> float:
        """When a worker of the domain would serve that is started there now."""
        profile, copy_s = self._profile, self._backbone.copy_s
        if self._system.sharing:
            backbone_at = device.backbone_at if device.is_open else self._checkpoint_at(device.host, now) + copy_s
            if self.forks:
                return self._forked_at(device, backbone_at, now)
            return max(now + profile.libraries_s + profile.worker_s, backbone_at)  # all that a fork does, after imports
        if self.forks:
            if self._has_spare(device, now):
                return now + profile.spare_s
            return max(self._forked_at(device, now, now), self._checkpoint_at(device.host, now)) + copy_s
        if domain in device.host.containers:
            return now + copy_s
        return max(now + profile.libraries_s, self._checkpoint_at(device.host, now)) + copy_s

    def again_s(self, domain: int, now: float) -> float:
        """What the start of a worker would take that is let go now, wherever it takes least."""
        profile, copy_s = self._profile, self._backbone.copy_s
        if self._system.sharing:
            return profile.spare_s if self.forks else profile.libraries_s + profile.worker_s
        if self.forks:
            others = [self.ready_at(domain, device, now) for device in self._devices if domain not in device.workers]
            return min(others) - now if others else profile.libraries_s + profile.worker_s + copy_s
        is_waiting = any(domain in host.containers for host in self._hosts)
        return copy_s + (0.0 if is_waiting else profile.libraries_s)

    def waits_for_backbone(self, device: Device, now: float) -> bool:
        """Whether a start there waits for a backbone too, shared or a copy of its own."""
        if self._system.sharing:
            return not device.is_open or device.backbone_at > now
        return not (self.forks and self._has_spare(device, now))

    def _has_spare(self, device: Device, now: float) -> bool:
        return bool(device.spares) and device.spares[0] <= now

    def _forked_at(self, device: Device, backbone_at: float, now: float) -> float:
        if self._has_spare(device, now):
            return now + self._profile.spare_s
        launcher_at = device.launcher_at if device.is_open else now + self._profile.libraries_s
        return max(max(now, launcher_at) + self._profile.worker_s, backbone_at)

    def _checkpoint_at(self, host: Host, now: float) -> float:
        """When the base checkpoint is in the host's memory: after its first use it stays there."""
        if host.checkpoint_at is None:
            return now + max(0.0, self._backbone.load_s - self._backbone.copy_s)
        return max(now, host.checkpoint_at)

    # --- what happens

    def begin(self, domain: int, device: Device, now: float) -> float:
        """Start it: open the device where that is needed, use a spare where there is one. Returns ready_at."""
        at = self.ready_at(domain, device, now)
        if self.opens and not device.is_open:
            self.open(device, now)
        elif self.forks and self._has_spare(device, now):
            del device.spares[0]
            copy_s = 0.0 if self._system.sharing else self._backbone.copy_s
            device.spares.append(now + self._refill_s + self._profile.worker_s + copy_s)
        elif domain not in device.host.containers:
            self._read_checkpoint(device.host, now)
        return at

    def open(self, device: Device, now: float) -> None:
        """Begin the launcher, load the shared backbone if there is one, and the spares after both."""
        copy_s = self._backbone.copy_s
        self._read_checkpoint(device.host, now)
        loaded_at = self._checkpoint_at(device.host, now)
        device.hold(self.open_bytes, now)
        device.is_open, device.closing = True, False
        device.launcher_at = now + self._profile.libraries_s
        device.backbone_at = loaded_at + copy_s
        if self._system.sharing:
            spare_at = max(device.backbone_at, device.launcher_at) + self._profile.worker_s
        else:
            spare_at = max(loaded_at, device.launcher_at + self._profile.worker_s) + copy_s
        device.spares = [spare_at] * self.num_spares

    def close(self, device: Device, now: float) -> None:
        assert device.is_open and not device.workers
        device.is_open, device.closing = False, False
        device.spares = []
        device.hold(-self.open_bytes, now)

    def _read_checkpoint(self, host: Host, now: float) -> None:
        if host.checkpoint_at is None:
            host.checkpoint_at = self._checkpoint_at(host, now)
            host.hold(self._backbone.size_bytes, now)
