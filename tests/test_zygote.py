"""The launcher as a real process: what it makes, what it reports, who outlives whom."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import xxhash

from serverlesslora.launcher.zygote import UVM_NODE
from serverlesslora_ipc import process
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.messages import (
    Exited,
    Fork,
    Forked,
    LauncherFailed,
    LauncherToGateway,
    Prepare,
    Prepared,
    PromptEcho,
    Ready,
    Sharing,
    Shutdown,
    WorkerLimits,
    WorkerToGateway,
)
from tests.server import wait_until

if TYPE_CHECKING:
    from serverlesslora.launcher.prepared import PreparedBackbone

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 100.0
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
LIMITS = WorkerLimits(threads=2, kv_bytes=1 << 20)


# --- what runs inside the launcher and its workers ---------------------------------------------------------------


def run(connection: socket.socket, prepared: PreparedBackbone, fork: Fork) -> int:
    """A worker's life for these tests; its domain says what it does."""
    channel: Channel[Any] = Channel(connection, Shutdown)
    match fork.domain:
        case "returns 7":
            return 7
        case "raises":
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            raise RuntimeError("a fault of ours")
        case "exits 3":
            sys.exit(3)
        case "writes to a weight":
            ctypes.memset(next(prepared.model.parameters()).data_ptr(), 1, 1)
        case "computes":
            import torch

            torch.set_num_threads(fork.limits.threads)
            torch.ones(1 << 20).sum()  # large enough for a parallel region
            with torch.inference_mode():
                ids = prepared.model(torch.arange(8)[None]).logits[0].argmax(-1)
            channel.send([PromptEcho(request_id="r", text="", token_ids=tuple(ids.tolist()))])
        case "is deaf":
            channel.send([Ready(pid=os.getpid(), attach_s=0.0)])
            while True:
                pass
        case _:
            channel.send([Ready(pid=os.getpid(), attach_s=0.0)])
            channel.receive()
    return 0


class Nothing:
    context_length = 1
    vocab_size = 1
    kv_bytes_per_token = 0
    size_bytes = 0


def prepare_nothing(
    backbone: str, weights_fd: int | None, manifest_fd: int, sharing: Sharing, handle: bytes
) -> Nothing:
    """For tests of processes: no model is needed to be killed."""
    if weights_fd is not None:
        os.close(weights_fd)
    os.close(manifest_fd)
    return Nothing()


def rehearse_nothing(prepared: Nothing, limits: WorkerLimits) -> Nothing:
    return prepared


def rehearse_for_ever(prepared: Nothing, limits: WorkerLimits) -> Nothing:
    process.set_name("slora-for-ever")
    while True:
        signal.pause()


def prepare_with_a_thread(backbone: str, *the_rest: Any) -> Nothing:
    import threading

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=signal.pause, name="pool", daemon=True).start()
    return prepare_nothing(backbone, *the_rest)


def prepare_on_a_gpu(backbone: str, *the_rest: Any) -> Nothing:
    """Leaves what initialising CUDA leaves: the driver's device node, open."""
    import tempfile

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory() as directory:
        os.open(f"{directory}/{UVM_NODE}", os.O_RDWR | os.O_CREAT)
        return prepare_nothing(backbone, *the_rest)


def prepare_by_handle(
    backbone: str, weights_fd: int | None, manifest_fd: int, sharing: Sharing, handle: bytes
) -> Nothing:
    assert weights_fd is None
    assert (sharing, handle) == ("cuda-ipc", b"handle")
    return prepare_nothing(backbone, weights_fd, manifest_fd, sharing, handle)


# --- the gateway's side ------------------------------------------------------------------------------------------


class Worker:
    def __init__(
        self,
        launcher: Launcher,
        worker_id: str,
        domain: str,
        *,
        limits: WorkerLimits = LIMITS,
        may_be_spare: bool = True,
    ) -> None:
        ours, theirs = socket.socketpair()
        fork = Fork(worker_id=worker_id, domain=domain, limits=limits, may_be_spare=may_be_spare)
        with theirs:
            launcher.channel.send([fork], [theirs.fileno()])
        self.channel: Channel[WorkerToGateway] = Channel(ours, WorkerToGateway)
        forked = launcher.receive()
        assert isinstance(forked, Forked)
        assert forked.worker_id == worker_id
        self.pid = forked.pid
        launcher.resources.callback(self.channel.close)

    def receive(self) -> WorkerToGateway:
        assert self.channel.poll(TIMEOUT_S), "the worker says nothing"
        (message,) = self.channel.receive().messages
        return message


class Launcher:
    def __init__(self, *arguments: str, worker: str | None = "tests.test_zygote:run") -> None:
        self.resources = ExitStack()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "serverlesslora.launcher.zygote", "--fd", str(theirs.fileno())]
        self.process = subprocess.Popen(
            [*command, *(["--worker", worker] if worker else []), *arguments],
            pass_fds=[theirs.fileno()],
            env=os.environ | ENVIRONMENT,  # also what a test has set since
        )
        theirs.close()
        self.channel: Channel[LauncherToGateway] = Channel(ours, LauncherToGateway)

    def receive(self) -> LauncherToGateway:
        assert self.channel.poll(TIMEOUT_S), "the launcher says nothing"
        (message,) = self.channel.receive().messages
        return message

    def prepare(self, weights_fd: int, manifest_fd: int) -> LauncherToGateway:
        self.channel.send([Prepare(backbone="base")], [weights_fd, manifest_fd])
        return self.receive()

    def ended(self) -> tuple[str, int]:
        exited = self.receive()
        assert isinstance(exited, Exited)
        return exited.worker_id, exited.status

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()
        self.channel.close()
        self.process.wait(TIMEOUT_S)


def empty_launcher(
    preparing: str = "prepare_nothing",
    *,
    rehearsing: str = "rehearse_nothing",
    num_spares: int = 0,
    sharing: Sharing = "memfd",
    handle: bytes = b"",
) -> Launcher:
    here = "tests.test_zygote"
    launcher = Launcher("--prepare", f"{here}:{preparing}", "--rehearsal", f"{here}:{rehearsing}")
    null = os.open(os.devnull, os.O_RDONLY)
    prepare = Prepare(backbone="base", num_spares=num_spares, limits=LIMITS, sharing=sharing, handle=handle)
    launcher.channel.send([prepare], [null] if sharing == "cuda-ipc" else [null, null])
    os.close(null)
    return launcher


@pytest.fixture(scope="module")
def backbone() -> Iterator[Any]:
    import tempfile

    from serverlesslora.backbone.loader import load
    from tests.fakes import byte_tokenizer, tiny_model

    with tempfile.TemporaryDirectory() as directory:
        tiny_model().save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        backbone = load(directory, dtype="float32")
        yield backbone
    os.close(backbone.weights_fd)
    os.close(backbone.manifest_fd)


@pytest.fixture(scope="module")
def launcher(backbone: Any) -> Iterator[Launcher]:
    with Launcher() as launcher:
        prepared = launcher.prepare(backbone.weights_fd, backbone.manifest_fd)
        assert isinstance(prepared, Prepared)
        assert (prepared.context_length, prepared.vocab_size) == (256, 260)
        assert prepared.size_bytes == backbone.manifest.total_bytes
        assert min(prepared.libraries_s, prepared.seconds) > 0
        yield launcher


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def children(pid: int) -> list[int]:
    return [int(child) for child in proc(pid, f"task/{pid}/children").split()]


def spares_of(launcher: Launcher, name: str = "slora-spare") -> list[int]:
    """Wait until there are spares; they rename themselves last."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [child for child in children(launcher.process.pid) if proc(child, "comm") == f"{name}\n"]
        return bool(found)

    wait_until(look, TIMEOUT_S)
    return found


def wait_for_end(pidfds: list[int]) -> None:
    for pidfd in pidfds:
        ready, _, _ = select.select([pidfd], [], [], TIMEOUT_S)
        os.close(pidfd)
        assert ready, "a process lives on"


def test_the_launcher_has_one_thread(launcher: Launcher) -> None:
    assert os.listdir(f"/proc/{launcher.process.pid}/task") == [str(launcher.process.pid)]


def test_a_worker_computes_with_threads_of_its_own(launcher: Launcher, backbone: Any) -> None:
    import torch

    from serverlesslora.backbone.attach import attach
    from serverlesslora_ipc import sealed

    model = attach(sealed.map_readonly(backbone.weights_fd), backbone.manifest, attention="eager")
    with torch.inference_mode():
        expected = model(torch.arange(8)[None]).logits[0].argmax(-1).tolist()
    for i in range(3):
        echo = Worker(launcher, f"w{i}", "computes").receive()
        assert isinstance(echo, PromptEcho)
        assert list(echo.token_ids) == expected
        assert launcher.ended() == (f"w{i}", 0)


def test_a_worker_is_itself(launcher: Launcher) -> None:
    first, second = Worker(launcher, "first", "waits"), Worker(launcher, "second", "waits")
    for worker in (first, second):
        assert worker.receive() == Ready(pid=worker.pid, attach_s=0.0)
        assert proc(worker.pid, "comm") == "slora-worker\n"
        assert os.getpgid(worker.pid) == os.getpgid(0), "one kill of the group must reach everybody"
        links = [os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{worker.pid}/fd")]
        assert len([link for link in links if link.startswith("socket:")]) == 1, "no channel but its own"
        assert not [link for link in links if "pidfd" in link or "manifest" in link]
    first.channel.close()
    assert launcher.ended() == ("first", 0)
    second.channel.send([Shutdown()])
    assert launcher.ended() == ("second", 0)


@pytest.mark.parametrize(("domain", "status"), [("returns 7", 7), ("raises", 1), ("exits 3", 3)])
def test_exit_codes(launcher: Launcher, domain: str, status: int) -> None:
    Worker(launcher, "w", domain)
    assert launcher.ended() == ("w", status)


def test_a_killed_worker_is_reported_and_its_channel_ends(launcher: Launcher) -> None:
    worker = Worker(launcher, "w", "waits")
    worker.receive()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ChannelClosed):
        worker.receive()
    assert launcher.ended() == ("w", -signal.SIGKILL)


def test_a_worker_that_writes_to_a_weight_dies_alone(launcher: Launcher, backbone: Any) -> None:
    other = Worker(launcher, "other", "waits")
    other.receive()
    Worker(launcher, "writer", "writes to a weight")
    assert launcher.ended() == ("writer", -signal.SIGSEGV)
    content = os.pread(backbone.weights_fd, backbone.manifest.total_bytes, 0)
    assert xxhash.xxh3_128_hexdigest(content) == backbone.manifest.content_digest
    other.channel.send([Shutdown()])
    assert launcher.ended() == ("other", 0)


def test_a_worker_outlives_its_launcher_but_not_its_channel() -> None:
    with empty_launcher() as launcher:
        assert isinstance(launcher.receive(), Prepared)
        deaf, waiting = Worker(launcher, "deaf", "is deaf"), Worker(launcher, "waiting", "waits")
        pidfds = [os.pidfd_open(worker.pid) for worker in (deaf, waiting)]
        deaf.receive()
        launcher.process.kill()
        assert launcher.process.wait(TIMEOUT_S) == -signal.SIGKILL
        assert isinstance(waiting.receive(), Ready), "made before, heard after"
        assert select.select(pidfds, [], [], 0)[0] == []
        deaf.channel.close()
        waiting.channel.close()
        wait_for_end(pidfds)


def test_a_spare_becomes_the_worker_and_is_replaced() -> None:
    with empty_launcher(num_spares=1) as launcher:
        assert isinstance(launcher.receive(), Prepared)
        (spare,) = spares_of(launcher)
        worker = Worker(launcher, "w", "waits")
        assert worker.pid == spare
        assert worker.receive() == Ready(pid=spare, attach_s=0.0)
        assert proc(spare, "comm") == "slora-worker\n"
        links = [os.readlink(f"/proc/{spare}/fd/{fd}") for fd in os.listdir(f"/proc/{spare}/fd")]
        assert len([link for link in links if link.startswith("socket:")]) == 1, "no channel but its own"
        assert spares_of(launcher) != [spare]
        worker.channel.send([Shutdown()])
        assert launcher.ended() == ("w", 0)


def test_a_spare_that_was_killed_is_not_missed() -> None:
    with empty_launcher(num_spares=1) as launcher:
        assert isinstance(launcher.receive(), Prepared)
        (spare,) = spares_of(launcher)
        pidfd = os.pidfd_open(spare)
        os.kill(spare, signal.SIGKILL)
        wait_for_end([pidfd])
        worker = Worker(launcher, "w", "returns 7")
        assert worker.pid != spare
        assert launcher.ended() == ("w", 7)


def test_a_spare_dies_with_its_launcher_and_a_worker_made_of_one_does_not() -> None:
    with empty_launcher(num_spares=1) as launcher:
        assert isinstance(launcher.receive(), Prepared)
        spares_of(launcher)
        worker = Worker(launcher, "w", "waits")
        worker.receive()  # by now it has renamed itself
        (spare,) = spares_of(launcher)
        spare_fd, worker_fd = os.pidfd_open(spare), os.pidfd_open(worker.pid)
        launcher.process.kill()
        launcher.process.wait(TIMEOUT_S)
        wait_for_end([spare_fd])
        assert select.select([worker_fd], [], [], 0)[0] == []
        worker.channel.close()
        wait_for_end([worker_fd])


def test_a_spare_that_still_rehearses_dies_with_its_launcher() -> None:
    with empty_launcher(rehearsing="rehearse_for_ever", num_spares=1) as launcher:
        assert isinstance(launcher.receive(), Prepared)
        (spare,) = spares_of(launcher, "slora-for-ever")
        pidfd = os.pidfd_open(spare)
        launcher.process.kill()
        wait_for_end([pidfd])


def test_everybody_dies_with_a_killed_gateway(tmp_path: Path) -> None:
    """A middle process plays the gateway and is killed while a worker computes and never looks at its channel."""
    gateway = (
        "import sys\n"
        "from tests.test_zygote import Worker, empty_launcher\n"
        "launcher = empty_launcher()\n"
        "launcher.receive()\n"
        "workers = [Worker(launcher, 'deaf', 'is deaf'), Worker(launcher, 'waiting', 'waits')]\n"
        "for worker in workers:\n"
        "    worker.receive()\n"
        "print(launcher.process.pid, *(worker.pid for worker in workers), flush=True)\n"
        "sys.stdin.read()\n"
    )
    before = sorted(os.listdir("/dev/shm"))
    middle = subprocess.Popen(
        [sys.executable, "-c", gateway],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT | {"TMPDIR": str(tmp_path)},
    )
    with middle:
        assert middle.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in middle.stdout.readline().split()]
        assert len(pidfds) == 3
        middle.kill()
    wait_for_end(pidfds)
    assert sorted(os.listdir("/dev/shm")) == before
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_starts_a_thread_is_refused() -> None:
    with empty_launcher("prepare_with_a_thread") as launcher:
        failed = launcher.receive()
        assert isinstance(failed, LauncherFailed)
        assert "started threads in the launcher" in failed.reason
        assert launcher.process.wait(TIMEOUT_S) == 1


def test_a_library_that_initialises_cuda_is_refused() -> None:
    with empty_launcher("prepare_on_a_gpu") as launcher:
        failed = launcher.receive()
        assert isinstance(failed, LauncherFailed)
        assert "initialised CUDA in the launcher" in failed.reason
        assert launcher.process.wait(TIMEOUT_S) == 1


def test_memory_shared_by_handle_comes_without_its_descriptor() -> None:
    with empty_launcher("prepare_by_handle", sharing="cuda-ipc", handle=b"handle") as launcher:
        assert isinstance(launcher.receive(), Prepared)


def test_the_launcher_ends_when_told_and_when_its_channel_does() -> None:
    for tell in (True, False):
        with empty_launcher() as launcher:
            launcher.receive()
            if tell:
                launcher.channel.send([Shutdown()])
            else:
                launcher.channel.close()
            assert launcher.process.wait(TIMEOUT_S) == 0
