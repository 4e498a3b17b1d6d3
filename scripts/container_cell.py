"""Runs an image's root file system as a container engine would with every restriction on, without an engine.

Called as process 1 of new mount, pid, ipc and uts namespaces (`unshare` makes them), it mounts the root read-only,
gives up every capability and the right to gain any, loads an engine's default system call filter, becomes the image's
user and then the image's command: nothing of this process stays. Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_LAST_CAPABILITY = Path("/proc/sys/kernel/cap_last_cap")
_MOUNTED = ("proc", "sys", "dev", "tmp")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {"fd": "/proc/self/fd", **{name: f"/proc/self/fd/{n}" for n, name in enumerate(("stdin", "stdout", "stderr"))}}

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(0)
_ENOSYS = 38
_COMPARE = {"SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5, "SCMP_CMP_GT": 6}
# What Podman's profile allows and those of Docker and containerd (RuntimeDefault in Kubernetes) refuse without the
# capability that goes with it: a server that runs without these runs under any of the three.
REFUSED_ELSEWHERE = frozenset(
    (
        *("io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "keyctl", "add_key", "request_key"),
        *("mbind", "set_mempolicy", "set_mempolicy_home_node", "get_mempolicy", "move_pages", "quotactl", "ptrace"),
        *("unshare", "setns", "mount", "umount", "umount2", "pivot_root", "fsopen", "fsmount", "fsconfig", "fspick"),
        *("move_mount", "open_tree", "mount_setattr", "clone3", "process_vm_readv", "process_vm_writev"),
        *("name_to_handle_at", "sethostname", "setdomainname"),
    )
)


class Cell(NamedTuple):
    """What to run, as the image's configuration says it."""

    root: str
    argv: list[str]
    env: list[str]
    user: int
    group: int
    folder: str
    writable: list[str]  # the image's volumes; each becomes a tmpfs of the user's own
    seccomp: str | None  # an engine's profile (JSON)


def run(cell: Cell) -> None:
    root = Path(cell.root)
    _mount_all(root, cell)
    os.chroot(root)
    os.chdir(cell.folder)
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(int(_LAST_CAPABILITY.read_text()) + 1):
        _check(libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0), "dropping a capability")
    _check(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "clearing ambient capabilities")
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "setting no_new_privs")
    os.setgroups([])
    os.setgid(cell.group)
    os.setuid(cell.user)  # gives up what the sets still hold
    # Becoming another user took back what `unshare --kill-child` had asked for.
    _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "dying with the parent")
    if cell.seccomp is not None:
        load_filter(json.loads(cell.seccomp))
    environment = dict(each.split("=", 1) for each in cell.env)
    os.execvpe(cell.argv[0], cell.argv, environment)


def load_filter(profile: dict[str, Any]) -> None:
    """The profile without REFUSED_ELSEWHERE, for a process that holds no capability."""
    library = ctypes.CDLL("libseccomp.so.2")  # loaded outside of the image, before the chroot: see `preload`
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(_ERRNO | 1))
    for group in profile["syscalls"]:
        if group["action"] != "SCMP_ACT_ALLOW" or not _applies(group):
            continue
        arguments = [_argument(each) for each in group.get("args") or ()]
        packed = (_Argument * len(arguments))(*arguments)
        for name in group["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if name not in REFUSED_ELSEWHERE and number >= 0:  # negative: not one of this machine's
                library.seccomp_rule_add_array(context, ctypes.c_uint32(_ALLOW), number, len(arguments), packed)
    # The C library falls back to clone on "no such call" only.
    clone3 = library.seccomp_syscall_resolve_name(b"clone3")
    library.seccomp_rule_add_array(context, ctypes.c_uint32(_ERRNO | _ENOSYS), clone3, 0, None)
    code = library.seccomp_load(context)
    if code != 0:
        raise OSError(-code, f"loading the system call filter: {os.strerror(-code)}")


def preload() -> None:
    """Libraries of this machine that are used after the chroot."""
    ctypes.CDLL("libseccomp.so.2")


class _Argument(ctypes.Structure):
    _fields_ = (("index", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _argument(given: dict[str, Any]) -> _Argument:
    if given["op"] == "SCMP_CMP_MASKED_EQ":
        return _Argument(given["index"], 7, given["value"], given["valueTwo"])
    return _Argument(given["index"], _COMPARE[given["op"]], given["value"], 0)


def _applies(group: dict[str, Any]) -> bool:
    """Whether the group is for this architecture and for a process without capabilities."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    includes, excludes = group.get("includes") or {}, group.get("excludes") or {}
    architectures = includes.get("arches")
    return not includes.get("caps") and machine in (architectures or [machine]) and not excludes.get("arches")


def _mount_all(root: Path, cell: Cell) -> None:
    owner = f"uid={cell.user},gid={cell.group}"
    _mount("--make-rprivate", "/")
    _mount("--bind", root, root)
    _mount("-t", "proc", "proc", root / "proc", "-o", "nosuid,nodev,noexec")
    _mount("--rbind", "/sys", root / "sys")
    _mount("-t", "tmpfs", "dev", root / "dev", "-o", "mode=755,nosuid,size=1m")
    for name in _DEVICES:
        number = os.stat(f"/dev/{name}").st_rdev
        os.mknod(root / "dev" / name, 0o666 | stat.S_IFCHR, number)
        os.chmod(root / "dev" / name, 0o666)
    for name, target in _LINKS.items():
        (root / "dev" / name).symlink_to(target)
    (root / "dev/shm").mkdir()
    _mount("-t", "tmpfs", "shm", root / "dev/shm", "-o", "mode=1777,nosuid,nodev,noexec,size=64m")
    _mount("-t", "tmpfs", "tmp", root / "tmp", "-o", "mode=1777,nosuid,nodev,noexec,size=64m")
    for path in cell.writable:
        _mount("-t", "tmpfs", "state", root / path.lstrip("/"), "-o", f"mode=700,nosuid,nodev,{owner}")
    _mount("-o", "remount,ro,nosuid,nodev,bind", root)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _check(code: int, doing: str) -> None:
    if code != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{doing}: {os.strerror(error)}")


if __name__ == "__main__":
    preload()
    platform.machine()  # remembered; the image may lack what it asks
    run(Cell(**json.loads(sys.argv[1])))
