"""What was measured of a running server, in a file: the simulator's latencies and sizes, the policies' first guess."""

from __future__ import annotations

from pathlib import Path

import msgspec

from serverlesslora.errors import ConfigError


class StepProfile(msgspec.Struct, frozen=True):
    """Times of steps on an otherwise idle device, fitted: one prompt of n tokens takes prefill_s + n·prefill_token_s,
    one decode step of b sequences takes decode_s + b·decode_row_s."""

    prefill_s: float
    prefill_token_s: float
    decode_s: float
    decode_row_s: float
    chunk_tokens: int  # the most prompt tokens of one step


class BackboneProfile(msgspec.Struct, frozen=True):
    size_bytes: int
    load_s: float  # from disk, in a process that has its libraries
    copy_s: float  # a private copy of it from host memory, for servers that do not share
    kv_bytes_per_token: int
    steps: StepProfile


class Profile(msgspec.Struct, frozen=True):
    measured_on: str  # machine and date, for people
    backbones: dict[str, BackboneProfile]
    libraries_s: float  # a fresh process until it has imported everything
    worker_s: float  # a worker forked from the launcher, until it can serve, and what its first step takes longer
    spare_s: float  # the same when a spare was waiting
    worker_bytes: int  # a worker's own memory without adapters and KV
    process_bytes: int  # a process of its own with libraries, that shares nothing
    adapter_s: float  # loading an adapter from disk: adapter_s + bytes·adapter_byte_s
    adapter_byte_s: float
    adapter_ram_s: float = 0.0  # the same from host memory to the device
    adapter_ram_byte_s: float = 0.0
    gateway_s: float = 0.002  # of a request's first token, outside the worker


def read_profile(path: str | Path) -> Profile:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigError(f"cannot read the profile {path}: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path} is not a profile: {error}") from error


def write_profile(path: str | Path, profile: Profile) -> None:
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
