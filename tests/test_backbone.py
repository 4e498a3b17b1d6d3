"""A backbone through sealed memory: the same logits to the bit, fused neighbours, a host that holds and verifies it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from serverlesslora.backbone import layout
from serverlesslora.backbone.attach import AttachError, attach
from serverlesslora.backbone.layout import TensorShape
from serverlesslora.backbone.loader import Backbone, BackboneInvalid, load
from serverlesslora_ipc import manifest as manifests
from serverlesslora_ipc import sealed
from serverlesslora_ipc.channel import Channel, ChannelClosed
from serverlesslora_ipc.messages import (
    Adopt,
    Attach,
    BackboneFailed,
    HostToGateway,
    Progress,
    Published,
    Shutdown,
    Verified,
    Verify,
)
from tests.fakes import byte_tokenizer, tiny_model

TIMEOUT_S = 60.0


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@contextmanager
def loaded(directory: Path, dtype: str = "float32") -> Iterator[Backbone]:
    backbone = load(str(directory), dtype=dtype)
    yield backbone
    os.close(backbone.weights_fd)
    os.close(backbone.manifest_fd)


def attached(backbone: Backbone) -> PreTrainedModel:
    weights = sealed.map_readonly(backbone.weights_fd)
    return attach(weights, manifests.read(backbone.manifest_fd), attention="eager")


def save(directory: Path, family: str) -> Path:
    tiny_model(family).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(tmp_path_factory.mktemp("llama"), "llama")
    byte_tokenizer().save_pretrained(directory)
    return directory


# --- loader and attach -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "float16"),
        ("llama:tied_bias", "bfloat16"),
        ("llama:dynamic_rope", "bfloat16"),
        ("qwen2", "bfloat16"),
        ("gemma3_text", "bfloat16"),
        ("mixtral", "bfloat16"),
        ("gpt_oss", "bfloat16"),
        ("gpt2", "float32"),
        ("deepseek_v3", "bfloat16"),
    ],
)
def test_logits_equal_from_pretrained_to_the_bit(family: str, dtype: str, tmp_path: Path) -> None:
    directory = save(tmp_path, family)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="eager")
    with loaded(directory, dtype) as backbone:
        model = attached(backbone)
    ids = torch.arange(24).view(2, 12) * 7 % 250
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected.eval()(ids).logits)
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: p.dtype for name, p in expected.named_parameters()
    }
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert type(model) is type(expected)


def test_every_parameter_is_a_view_of_the_one_mapping(tmp_path: Path) -> None:
    with loaded(save(tmp_path, "llama:tied_bias")) as backbone:
        model = attached(backbone)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == 1
    tied = dict(model.named_parameters(remove_duplicate=False))
    assert tied["lm_head.weight"] is tied["model.embed_tokens.weight"]
    assert sum(spec.size for spec in backbone.manifest.tensors) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "llama:tied_bias", "qwen2", "gemma3_text"])
def test_siblings_are_one_matrix(family: str, tmp_path: Path) -> None:
    with loaded(save(tmp_path, family)) as backbone:
        layer = attached(backbone).model.layers[1]
    for members in (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
    ):
        for kind in ("weight", "bias"):
            parts = [getattr(member, kind) for member in members]
            if parts[0] is None:
                continue
            rows = sum(part.shape[0] for part in parts)
            joined = parts[0].as_strided((rows, *parts[0].shape[1:]), parts[0].stride())
            assert torch.equal(joined, torch.cat(parts))
            assert parts[0].data_ptr() % layout.ALIGNMENT == 0


def test_buffers_are_private_and_writable(llama: Path) -> None:
    with loaded(llama) as backbone:
        model = attached(backbone)
        buffer = model.model.rotary_emb.inv_freq
        buffer.zero_()  # a view of the mapping would end this process
        assert attached(backbone).model.rotary_emb.inv_freq.any()


def test_another_architectures_manifest_is_refused(llama: Path) -> None:
    with loaded(llama) as backbone:
        weights = sealed.map_readonly(backbone.weights_fd)
        manifest = backbone.manifest
        for change, reason in (
            ({"tensors": manifest.tensors[1:]}, "no value for"),
            ({"buffers": ()}, "no value for"),
            ({"architecture": "NoSuchForCausalLM"}, "has no NoSuchForCausalLM"),
            ({"architecture": "AutoConfig"}, "has no AutoConfig"),
            ({"total_bytes": 1}, "describes 1"),
            ({"aliases": {"lm_head.extra": "lm_head.weight"}}, r"no parameter lm_head\.extra"),
        ):
            with pytest.raises(AttachError, match=reason):
                attach(weights, msgspec.structs.replace(manifest, **change), attention="eager")


def test_progress_ends_at_the_total(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    backbone = load(str(llama), dtype="float32", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (backbone.manifest.total_bytes, backbone.manifest.total_bytes)
    os.close(backbone.weights_fd)
    os.close(backbone.manifest_fd)


def test_what_cannot_be_served_is_refused_with_the_reason(llama: Path, tmp_path: Path) -> None:
    def variant(name: str, *without: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(llama, copy)
        for file in without:
            (copy / file).unlink()
        return copy

    pickled = variant("pickled", "model.safetensors")
    torch.save(tiny_model().state_dict(), pickled / "pytorch_model.bin")
    truncated = variant("truncated")
    with open(truncated / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    incomplete = variant("incomplete")
    config = (incomplete / "config.json").read_text()
    (incomplete / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    for directory, reason in (
        ("/no/such/model", "there is no directory"),
        (tmp_path, "no config.json"),
        (variant("empty", "model.safetensors"), r"no \*.safetensors"),
        (pickled, "only pickled weights"),
        (truncated, "cannot be loaded"),
        (incomplete, r"lacks \d+ weights .*model.layers.2"),
    ):
        with pytest.raises(BackboneInvalid, match=reason):
            load(str(directory), dtype="float32")
    with pytest.raises(BackboneInvalid, match="dtype 'int8'"):
        load(str(llama), dtype="int8")
    allowed = load(str(pickled), dtype="float32", allow_pickle=True)
    assert allowed.manifest.tensors
    os.close(allowed.weights_fd)
    os.close(allowed.manifest_fd)


def test_layout_fuses_only_what_fits() -> None:
    def tensor(rows: int, columns: int, dtype: str = "float32") -> TensorShape:
        return TensorShape((rows, columns), dtype, rows * columns * 4)

    runs = layout.runs(
        {
            "embed.weight": tensor(3, 8),
            "0.attn.k_proj.weight": tensor(2, 8),
            "0.attn.q_proj.weight": tensor(4, 8),
            "0.attn.v_proj.weight": tensor(2, 8),
            "1.attn.q_proj.weight": tensor(4, 8),
            "1.attn.k_proj.weight": tensor(2, 8),  # no v
            "0.mlp.gate_proj.weight": tensor(4, 8),
            "0.mlp.up_proj.weight": tensor(4, 8, "float16"),
        }
    )
    assert runs == [
        ("embed.weight",),
        ("0.attn.q_proj.weight", "0.attn.k_proj.weight", "0.attn.v_proj.weight"),
        ("1.attn.q_proj.weight",),
        ("1.attn.k_proj.weight",),
        ("0.mlp.gate_proj.weight",),
        ("0.mlp.up_proj.weight",),
    ]
    assert layout.offsets([("a", "b"), ("c",)], {"a": 10, "b": 60, "c": 1}) == ({"a": 0, "b": 10, "c": 128}, 129)


# --- the host process --------------------------------------------------------------------------------------------


class Host:
    """A host process and the gateway's end of its channel."""

    def __init__(self, module: str, *arguments: str) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", f"serverlesslora.backbone.{module}", "--fd", str(theirs.fileno()), *arguments]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment())
        theirs.close()
        self.channel: Channel[HostToGateway] = Channel(ours, HostToGateway)

    def receive(self) -> tuple[HostToGateway, list[int]]:
        """The next message that is not progress."""
        while True:
            assert self.channel.poll(TIMEOUT_S), "the host says nothing"
            (message,), fds = self.channel.receive()
            if not isinstance(message, Progress):
                return message, fds

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        assert self.process.wait(TIMEOUT_S) is not None, "the end of its channel ends a host"


def memory_files(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # the descriptor that lists the folder, where it is our own
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}").split(" ")[0])
    return sorted(name for name in found if name.startswith("/memfd:slora"))


def resident_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def test_host_loads_holds_hands_out_and_verifies(llama: Path) -> None:
    with Host("host", "--model", str(llama), "--dtype", "float32") as host:
        published, fds = host.receive()
        assert isinstance(published, Published)
        for fd in fds:
            sealed.check_sealed(fd)
        manifest = manifests.read(fds[1])
        assert manifest.content_digest == published.content_digest
        assert manifest.layout_digest == published.layout_digest
        assert manifest.tokenizer == str(llama)
        host.channel.send([Attach(), Verify()])
        again, fds_again = host.receive()
        assert again == published
        assert [os.fstat(fd).st_ino for fd in fds_again] == [os.fstat(fd).st_ino for fd in fds]
        verified, _ = host.receive()
        assert verified == Verified(content_digest=published.content_digest, intact=True)
        assert memory_files(host.process.pid) == ["/memfd:slora-manifest", "/memfd:slora-weights"]
        assert resident_mib(host.process.pid) < 40
        host.channel.send([Shutdown()])
        assert host.process.wait(TIMEOUT_S) == 0
        for fd in (*fds, *fds_again):
            os.close(fd)


def test_a_restarted_host_adopts_the_memory(llama: Path) -> None:
    with loaded(llama) as backbone, Host("hold") as host:
        host.channel.send([Attach()])
        early, _ = host.receive()
        assert isinstance(early, BackboneFailed)
        assert "no backbone is held yet" in early.reason
        host.channel.send([Adopt()], [backbone.weights_fd, backbone.manifest_fd])
        published, fds = host.receive()
        assert isinstance(published, Published)
        assert published.content_digest == backbone.manifest.content_digest
        host.channel.send([Verify()])
        verified, _ = host.receive()
        assert isinstance(verified, Verified)
        assert verified.intact
        for fd in fds:
            os.close(fd)


def test_memory_that_could_still_be_written_is_not_adopted(llama: Path) -> None:
    unsealed = os.memfd_create("slora-test", os.MFD_ALLOW_SEALING)
    with loaded(llama) as backbone, Host("hold") as host:
        host.channel.send([Adopt()], [unsealed, backbone.manifest_fd])
        failed, _ = host.receive()
        assert isinstance(failed, BackboneFailed)
        assert "seals are" in failed.reason
        assert host.process.wait(TIMEOUT_S) == 1
    os.close(unsealed)


def test_verification_notices_a_wrong_byte(llama: Path) -> None:
    with loaded(llama) as backbone:
        content = bytearray(os.pread(backbone.weights_fd, backbone.manifest.total_bytes, 0))
        content[1000] ^= 1
        wrong = sealed.seal_bytes("slora-test", bytes(content))
        manifest_fd = manifests.seal(msgspec.structs.replace(backbone.manifest, model="tampered"))
        with Host("hold") as host:
            host.channel.send([Adopt()], [wrong, manifest_fd])
            for fd in host.receive()[1]:
                os.close(fd)
            host.channel.send([Verify()])
            verified, _ = host.receive()
            assert isinstance(verified, Verified)
            assert not verified.intact
        os.close(wrong)
        os.close(manifest_fd)


def test_host_says_why_it_cannot_load(tmp_path: Path) -> None:
    with Host("host", "--model", str(tmp_path)) as host:
        failed, _ = host.receive()
        assert isinstance(failed, BackboneFailed)
        assert "no config.json" in failed.reason
        assert host.process.wait(TIMEOUT_S) == 1


def test_kill_leaves_nothing_behind(llama: Path) -> None:
    shm, open_before = sorted(os.listdir("/dev/shm")), sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with loaded(llama) as backbone, Host("hold") as host:
            host.channel.send([Adopt()], [backbone.weights_fd, backbone.manifest_fd])
            for fd in host.receive()[1]:
                os.close(fd)
            host.process.send_signal(signal.SIGKILL)
            assert host.process.wait(TIMEOUT_S) == -signal.SIGKILL
            with pytest.raises(ChannelClosed):
                host.channel.receive()
        assert memory_files(os.getpid()) == []
    assert sorted(os.listdir("/dev/shm")) == shm
    assert sorted(os.listdir("/proc/self/fd")) == open_before


def test_host_dies_with_its_gateway_while_loading(llama: Path) -> None:
    """The gateway is killed, not closed: a middle process starts the host, tells its id and is killed at once."""
    gateway = (
        "import socket, subprocess, sys, time\n"
        "ours, theirs = socket.socketpair()\n"
        "arguments = ['--fd', str(theirs.fileno()), '--model', sys.argv[1]]\n"
        "host = subprocess.Popen([sys.executable, '-m', 'serverlesslora.backbone.host', *arguments],"
        " pass_fds=[theirs.fileno()])\n"
        "print(host.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    middle = subprocess.Popen(
        [sys.executable, "-c", gateway, str(llama)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with middle:
        assert middle.stdout is not None
        pidfd = os.pidfd_open(int(middle.stdout.readline()))
        middle.kill()
    ready, _, _ = select.select([pidfd], [], [], TIMEOUT_S)
    os.close(pidfd)
    assert ready
