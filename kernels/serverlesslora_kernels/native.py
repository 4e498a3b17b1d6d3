"""Compiles the C kernels once per machine with the system compiler and loads them on torch's own OpenMP pool.

An image runs on machines that did not build it and have no compiler: it brings libraries built ahead for a few kinds of
processor (`python -m serverlesslora_kernels.native --portable`), of which the best one that runs here is loaded.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
# -fno-math-errno lets expf and friends vectorise; nothing here may assume away NaN, so never -ffast-math.
COMMON_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fopenmp", "-fPIC", "-Wall", "-Wextra")
FLAGS = ("-march=native", *COMMON_FLAGS)
REQUIRED_CPU_FLAGS = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"})


class Level(NamedTuple):
    """A kind of processor that libraries are built for ahead."""

    name: str
    march: tuple[str, ...]  # for the compiler
    needed: frozenset[str]  # what the compiler may use, in the words of /proc/cpuinfo


_V4 = REQUIRED_CPU_FLAGS | {"avx", "avx512cd", "bmi1", "bmi2", "f16c", "movbe", "abm", "xsave"}
LEVELS = (  # the best comes first
    Level("v4-bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    Level("v4", ("-march=x86-64-v4",), _V4),
)
PORTABLE = SOURCES / "portable"


@functools.cache
def load(source: str) -> ctypes.CDLL | None:
    """The library built from `native/<source>.c`, or None where it is switched off or this machine cannot have it.

    Nothing is compiled and no thread is started by importing this module; the pool starts with the first kernel call.
    """
    if os.environ.get("SERVERLESSLORA_NATIVE") == "0":
        return None
    flags = cpu_flags()
    if not flags >= REQUIRED_CPU_FLAGS or not _promote_openmp():
        return None
    try:
        return _load_or_build(source, flags)
    except subprocess.CalledProcessError as error:
        log.warning("native kernel %r was not built, torch is used instead: %s", source, error.stderr.strip())
    except OSError as error:
        log.warning("native kernel %r was not loaded, torch is used instead: %s", source, error)
    return None


def build_all() -> dict[str, bool]:
    """Build every source ahead of time: source name -> whether it can be used here."""
    return {path.stem: load(path.stem) is not None for path in sorted(SOURCES.glob("*.c"))}


def cache_dir() -> Path:
    """Where built libraries are kept for this user."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "serverlesslora" / "native"


def _load_or_build(source: str, flags: frozenset[str]) -> ctypes.CDLL | None:
    cached = cache_dir() / f"{_key(source, flags)}.so"
    if cached.exists():
        return ctypes.CDLL(str(cached))
    if (portable := _portable(source, flags)) is not None:
        return ctypes.CDLL(str(portable))
    compiler = _compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="serverlesslora-") as scratch:
        built = Path(scratch) / f"{source}.so"
        _compile(SOURCES / f"{source}.c", built, compiler, FLAGS)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _install(built, cached)
        except OSError:  # a read-only or full home: the library still works, it is only built again next time
            return ctypes.CDLL(str(built))
    return ctypes.CDLL(str(cached))


def build_portable(folder: Path = PORTABLE) -> list[Path]:
    """Build every source for every level, whatever this processor is; there are levels for x86-64 only."""
    if platform.machine() != "x86_64":
        return []
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("building needs a C compiler: cc, gcc, clang, or the one that CC names")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for path in sorted(SOURCES.glob("*.c")):
        for level in LEVELS:
            made.append(folder / _portable_name(path.stem, level))
            _compile(path, made[-1], compiler, (*level.march, *COMMON_FLAGS))
            made[-1].with_suffix(".o").unlink()
    return made


def _portable(source: str, flags: frozenset[str]) -> Path | None:
    """The best library built ahead from the sources as they are now that a processor with these flags can run."""
    paths = (PORTABLE / _portable_name(source, level) for level in LEVELS if flags >= level.needed)
    return next((path for path in paths if path.exists()), None)


def _portable_name(source: str, level: Level) -> str:
    return f"{source}-{level.name}-{_digest(source, *level.march, *COMMON_FLAGS)}.so"


def _compile(source: Path, output: Path, compiler: str, flags: tuple[str, ...]) -> None:
    """Compile with OpenMP but link without it: the symbols must come from the libgomp that torch brought."""
    compiled = output.with_suffix(".o")
    steps = (
        [compiler, *flags, "-c", str(source), "-o", str(compiled)],
        [compiler, "-shared", str(compiled), "-o", str(output), "-lm"],
    )
    for step in steps:
        subprocess.run(step, check=True, capture_output=True, text=True, timeout=120)


def _install(built: Path, cached: Path) -> None:
    """Publish in one rename, so that processes building at the same time never see half a library."""
    handle, temporary = tempfile.mkstemp(dir=cached.parent, suffix=".tmp")
    os.close(handle)
    try:
        shutil.copyfile(built, temporary)
        os.replace(temporary, cached)
    except BaseException:
        os.unlink(temporary)
        raise


def _key(source: str, flags: frozenset[str]) -> str:
    return f"{source}-{_digest(source, *FLAGS, torch.__version__, *sorted(flags))}"


def _digest(source: str, *circumstances: str) -> str:
    digest = hashlib.sha256()
    for part in (source, *circumstances):
        digest.update(part.encode() + b"\0")
    for path in (SOURCES / f"{source}.c", *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _compiler() -> str | None:
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cpu_flags() -> frozenset[str]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    with open("/proc/cpuinfo") as cpuinfo:
        line = next((line for line in cpuinfo if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def _promote_openmp() -> bool:
    """Make torch's OpenMP symbols visible to the libraries loaded next; a second runtime would be a second pool."""
    for path in _openmp_candidates():
        try:
            if hasattr(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL), "GOMP_parallel"):
                return True
        except OSError:
            continue
    return False


def _openmp_candidates() -> Iterator[Path]:
    """What is mapped already comes first, torch's own copy before anybody else's."""
    package = Path(torch.__file__).parent
    homes = (package / "lib", package.parent / "torch.libs")
    with open("/proc/self/maps") as maps:
        mapped = {
            Path(fields[5].strip()) for line in maps if len(fields := line.split(None, 5)) == 6 and "omp" in fields[5]
        }
    runtimes = sorted(path for path in mapped if path.name.startswith(("libgomp", "libiomp", "libomp")))
    yield from sorted(runtimes, key=lambda path: path.parent not in homes)
    for home in homes:
        yield from sorted(home.glob("libgomp*"))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if sys.argv[1:] == ["--portable"]:
        try:
            print(*build_portable(), sep="\n")
        except subprocess.CalledProcessError as error:
            sys.exit(error.stderr)
        sys.exit(0)
    for name, usable in build_all().items():
        print(f"{name}: {'ready' if usable else 'not available on this machine, torch is used'}")
