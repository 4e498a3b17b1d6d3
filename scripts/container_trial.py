"""Starts an image's root file system in a cell, asks the demo's functions and checks what a container must keep to.

    scripts/container_trial.py --root DIR --image-config FILE.json

needs root, and prints one JSON result. `scripts/container.sh` builds the image and calls this. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import http.client
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from serverlesslora.demo import TASKS

PORT, ADMIN_PORT = 8000, 8001
ASKED = ("upper", "reverse", "rot13", "swapcase")
TEXT = "hello world"
BAR_S = 15.0  # from process start to the fourth right answer
DEADLINE_S = 120.0
SETTLE_S = 5.0  # by then nothing of a killed process may be left
ADAPTERS = "/opt/serverlesslora/lib/python3.11/site-packages/serverlesslora/demo/assets/adapters"
PORTABLE = "/serverlesslora_kernels/native/portable/"
_CLONE_NEWNET, _SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x40000000, 0x8913, 0x8914


class Check(NamedTuple):
    name: str
    passed: bool
    found: Any = None


def ask(method: str, path: str, body: Any = None, port: int = PORT) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(
            method, path, None if body is None else json.dumps(body), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def chat(function: str, text: str) -> str:
    body = {"model": function, "temperature": 0, "messages": [{"role": "user", "content": text}]}
    status, answer = ask("POST", "/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"]) if status == 200 else f"{status}: {answer}"


def wait_until(is_true: Callable[[], bool], deadline_s: float) -> bool:
    end = time.monotonic() + deadline_s
    while not (found := is_true()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def is_ready() -> bool:
    try:
        return ask("GET", "/ready")[0] == 200
    except OSError:
        return False


class Container:
    """The running cell: `pid` is its process 1 as this machine counts."""

    def __init__(self, root: Path, config: dict[str, Any], seccomp: Path | None, log: Path) -> None:
        uid, _, gid = config["User"].partition(":")
        cell = {
            "root": str(root),
            "argv": [*config["Entrypoint"], *config["Cmd"]],
            "env": config["Env"],
            "user": int(uid),
            "group": int(gid),
            "folder": config["WorkingDir"],
            "writable": list(config["Volumes"]),
            "seccomp": None if seccomp is None else seccomp.read_text(),
        }
        self.user = int(uid)
        script = Path(__file__).with_name("container_cell.py")
        self._log = log.open("wb")
        self._unshare = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
            + [sys.executable, str(script), json.dumps(cell)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        wait_until(lambda: bool(children.read_text().strip()), 10.0)
        self.pid = int(children.read_text().split()[0])

    @property
    def has_ended(self) -> bool:
        return self._unshare.poll() is not None

    def processes(self) -> dict[int, dict[str, str]]:
        """Everything in the cell's pid namespace, as /proc/PID/status says it."""
        inside = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.stat(folder / "ns/pid").st_ino == inside:
                    lines = (folder / "status").read_text().splitlines()
                    found[int(folder.name)] = {
                        name: rest.strip() for name, _, rest in (x.partition(":") for x in lines)
                    }
        return found

    def named(self, name: str) -> list[int]:
        return [pid for pid, status in self.processes().items() if status["Name"] == name]

    def zombies(self) -> list[str]:
        return [status["Name"] for status in self.processes().values() if status["State"].startswith("Z")]

    def memory_bytes(self) -> int:
        """Proportional set sizes: what is shared, the backbone's memory file included, counts once."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        return total

    def processor_s(self) -> float:
        """What all processes used of the cores, those that ended and were waited for included."""
        ticks = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
        return ticks / os.sysconf("SC_CLK_TCK")

    def maps(self, pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    def write_error(self, path: str) -> str:
        """What the kernel says to this process, which is root, when it creates a file there."""
        try:
            os.close(os.open(f"/proc/{self.pid}/root{path}", os.O_CREAT | os.O_WRONLY | os.O_EXCL))
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        os.unlink(f"/proc/{self.pid}/root{path}")
        return "written"

    def execute(self, argv: list[str], given: str = "") -> int:
        """In the cell, as its user: what an engine's health check and `exec` do. `given` is the standard input."""
        entered = ["nsenter", "--target", str(self.pid), "--all", "--root", "--wd"]
        as_user = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--no-new-privs"]
        reading, writing = os.pipe()
        os.fchown(reading, self.user, self.user)  # as engines do: otherwise /dev/stdin cannot be opened
        with os.fdopen(writing, "w") as file:
            file.write(given)  # little enough for a pipe to hold
        with os.fdopen(reading) as file:
            ran = subprocess.run([*entered, *as_user, *argv], check=False, stdin=file, stdout=subprocess.DEVNULL)
        return ran.returncode

    def stop(self) -> tuple[int | None, float]:
        """SIGTERM to process 1; its exit code and how long it took, in seconds."""
        began = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        try:
            return self._unshare.wait(60), time.monotonic() - began
        except subprocess.TimeoutExpired:
            return None, time.monotonic() - began

    def close(self) -> None:
        if self._unshare.poll() is None:
            self._unshare.kill()  # --kill-child: process 1 and with it the namespace go too
            self._unshare.wait()
        self._log.close()


def trial(container: Container, config: dict[str, Any], began: float) -> Iterator[Check]:
    ready = wait_until(lambda: is_ready() or container.has_ended, DEADLINE_S) and not container.has_ended
    yield Check("ready", ready, round(time.monotonic() - began, 2))
    if not ready:
        return
    answers = {name: chat(name, TEXT) for name in ASKED}
    took_s, used_s = time.monotonic() - began, container.processor_s()
    yield Check("four functions answer exactly", answers == {name: TASKS[name](TEXT) for name in ASKED}, answers)
    yield Check(f"fourth answer within {BAR_S:g} s", took_s <= BAR_S, round(took_s, 2))
    yield Check("processor seconds until then", True, round(used_s, 2))  # the same on a machine with other work
    yield from _confinement(container)
    if config.get("Healthcheck"):
        code = container.execute(config["Healthcheck"]["Test"][1:])
        yield Check("the image's health check says 0", code == 0, code)
    yield Check("memory of all processes, MiB", True, container.memory_bytes() >> 20)
    yield from _functions(container)
    yield from _kills(container)
    yield from _drain(container)


def _confinement(container: Container) -> Iterator[Check]:
    processes = container.processes()
    users = sorted({int(uid) for status in processes.values() for uid in status["Uid"].split()})
    yield Check("every process is the image's user, none root", users == [container.user], users)
    rights = {(s["CapEff"], s["CapPrm"], s["CapBnd"], s["CapAmb"], s["NoNewPrivs"]) for s in processes.values()}
    bare = all(int(each, 16) == 0 for right in rights for each in right[:4]) and {r[4] for r in rights} == {"1"}
    yield Check("no process has or can gain a capability", bare, sorted(rights))
    yield Check("system call filter on every process", all(s["Seccomp"] == "2" for s in processes.values()))
    tried = {path: container.write_error(f"{path}/written") for path in ("", "/opt/serverlesslora", "/etc", "/usr")}
    yield Check("nothing of the image can be written, not even by root", set(tried.values()) == {"EROFS"}, tried)
    listening = set(_listening(container.pid))
    expected = {("00000000", PORT), ("0100007F", ADMIN_PORT)}
    yield Check("the API is on every address, the admin API on 127.0.0.1", listening == expected, sorted(listening))
    workers = container.named("slora-worker")
    native = [pid for pid in workers if PORTABLE in container.maps(pid)]
    yield Check("workers run the kernels compiled into the image", bool(workers) and native == workers, len(workers))


def _functions(container: Container) -> Iterator[Check]:
    """A file of functions over `exec`, as docs/container.md says."""
    file = f'[[functions]]\nname = "louder"\ntenant = "acme"\nadapter = "{ADAPTERS}/upper"\n'
    code = container.execute(["/opt/serverlesslora/bin/serverlesslora", "apply", "-f", "/dev/stdin"], file)
    answer = chat("louder", TEXT)
    right = code == 0 and answer == TASKS["upper"](TEXT)
    yield Check("a function applied from a file answers", right, {"code": code, "answer": answer})


def _listening(pid: int) -> Iterator[tuple[str, int]]:
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            address, port = fields[1].split(":")
            yield address, int(port, 16)


def slow_modules(root: Path) -> list[str]:
    """Modules that every start would compile again: without bytecode, or with bytecode that Python compares with its
    source's time, which copying changes."""
    found = []
    for source in root.glob("opt/serverlesslora/lib/python3*/site-packages/**/*.py"):
        compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
        if compiled.exists():
            with compiled.open("rb") as file:
                is_slow = file.read(8)[4:] != (1).to_bytes(4, "little")  # PEP 552: by hash, and not checked
        else:
            is_slow = _is_python(source)
        if is_slow:
            found.append(str(source.relative_to(root)))
    return found


def _is_python(source: Path) -> bool:
    """Libraries bring templates, and files for Pythons to come."""
    try:
        compile(source.read_bytes(), str(source), "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def forget_pages(root: Path) -> None:
    """Take the image's files out of the page cache: what follows reads them from the disk."""
    os.sync()  # only what is written can be forgotten
    for path in root.glob("opt/serverlesslora/**/*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _kills(container: Container) -> Iterator[Check]:
    """What a killed process leaves is nobody's to collect but its parent's or, without one, process 1's."""
    for name in ("slora-worker", "slora-launcher"):
        victim = container.named(name)[0]
        os.kill(victim, signal.SIGKILL)
        gone = wait_until(lambda victim=victim: victim not in container.processes(), SETTLE_S)  # type: ignore[misc]
        clean = wait_until(lambda: not container.zombies(), SETTLE_S)
        yield Check(f"no zombie after {name} is killed", gone and clean, container.zombies())
        wait_until(lambda: chat(ASKED[0], TEXT) == TASKS[ASKED[0]](TEXT), DEADLINE_S)
        answers = {each: chat(each, TEXT) for each in ASKED}
        right = answers == {each: TASKS[each](TEXT) for each in ASKED}
        yield Check(f"exact answers after {name} is killed", right, answers)


def _drain(container: Container) -> Iterator[Check]:
    started, stream = threading.Event(), dict[str, Any]()

    def read() -> None:
        body = {"model": "upper", "prompt": "hello\n", "max_tokens": 150, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        lines = []
        for line in connection.getresponse():
            lines.append(line)
            started.set()
        stream["done"] = any(line.startswith(b"data: [DONE]") for line in lines)
        stream["events"] = sum(line.startswith(b"data:") for line in lines)

    reader = threading.Thread(target=read)
    reader.start()
    started.wait(30)
    under_way = "done" not in stream
    code, took_s = container.stop()
    reader.join(60)
    ended = under_way and bool(stream.get("done"))
    yield Check("a stream under way at SIGTERM ends as it should", ended, stream)
    yield Check("process 1 ends with 0 after SIGTERM", code == 0, {"code": code, "seconds": round(took_s, 2)})


def bytecode(root: Path) -> Check:
    found = slow_modules(root)
    return Check("every module has bytecode that is used as it is", not found, found[:5])


def own_network() -> None:
    """This process, and what it starts, in a network of its own with nothing but the loopback device."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "a network of its own was refused; root is needed")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the image's root file system, mounted")
    parser.add_argument("--image-config", type=Path, required=True, help="the image's configuration (Docker's JSON)")
    parser.add_argument("--seccomp", type=Path, help="an engine's system call profile, JSON")
    parser.add_argument("--cold", action="store_true", help="take its files out of the page cache first")
    parser.add_argument("--log", type=Path, required=True, help="where the server's output goes")
    given = parser.parse_args()
    config = json.loads(given.image_config.read_text())
    own_network()
    if given.cold:
        forget_pages(given.root)
    began = time.monotonic()
    load = os.getloadavg()[0]  # of others: start times mean little without it
    container = Container(given.root, config, given.seccomp, given.log)
    checks: list[Check] = []
    try:
        for check in itertools.chain(trial(container, config, began), [bytecode(given.root)]):
            checks.append(check)
            print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.found}", file=sys.stderr, flush=True)
    finally:
        container.close()
    passed = sum(check.passed for check in checks)
    setup = {"kernel": platform.release(), "cores": os.cpu_count(), "load_before": round(load, 1)}
    setup |= {"seccomp": str(given.seccomp or "none"), "files_read_from": "disk" if given.cold else "page cache"}
    result = {"setup": setup, "passed": passed, "failed": len(checks) - passed}
    print(json.dumps(result | {"checks": [check._asdict() for check in checks]}))
    return 0 if passed == len(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
