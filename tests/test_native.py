"""Building and loading the C kernels: once per machine, on torch's own thread pool, optional."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serverlesslora_kernels import native

KERNELS = Path(native.__file__).parents[1]


def run_python(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(KERNELS), **environment}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def usable() -> bool:
    return native.load("linear") is not None


needs_native = pytest.mark.skipif(not usable(), reason="no C compiler, or a CPU without the instructions")


@needs_native
def test_cold_build_installs_one_library_and_a_second_process_reuses_it(tmp_path: Path) -> None:
    code = "from serverlesslora_kernels import native; assert native.load('linear')"
    run_python(code, XDG_CACHE_HOME=str(tmp_path))
    (built,) = (tmp_path / "serverlesslora" / "native").iterdir()
    before = built.stat()
    assert before.st_mode & 0o077 == 0
    run_python(code, XDG_CACHE_HOME=str(tmp_path), PATH="")  # even the compiler is needed only for the first
    assert (built.stat().st_mtime_ns, built.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@needs_native
def test_processes_that_build_at_the_same_time_all_succeed(tmp_path: Path) -> None:
    code = "from serverlesslora_kernels import native; assert native.load('linear')"
    env = {**os.environ, "PYTHONPATH": str(KERNELS), "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [path.suffix for path in (tmp_path / "serverlesslora" / "native").iterdir()] == [".so"]


@needs_native
def test_a_home_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    code = "from serverlesslora_kernels import native; assert native.load('linear')"
    run_python(code, XDG_CACHE_HOME=str(blocked))


def test_switched_off_by_the_environment() -> None:
    code = "from serverlesslora_kernels import native; print(native.load('linear'))"
    assert run_python(code, SERVERLESSLORA_NATIVE="0") == "None"


def test_without_a_compiler_torch_does_the_work(tmp_path: Path) -> None:
    code = """
import torch
from serverlesslora_kernels import native
from serverlesslora_kernels.linear import linear
assert native.load('linear') is None
x, w = torch.randn(2, 8).bfloat16(), torch.randn(3, 8).bfloat16()
assert torch.equal(linear(x, w), torch.nn.functional.linear(x, w))
"""
    run_python(code, XDG_CACHE_HOME=str(tmp_path), PATH="", CC="")


@needs_native
def test_a_compiler_that_fails_is_reported_and_not_fatal(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    code = "from serverlesslora_kernels import native; print(native.load('linear'))"
    env = {**os.environ, "PYTHONPATH": str(KERNELS), "XDG_CACHE_HOME": str(tmp_path), "CC": str(compiler)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "None"
    assert "no such flag" in result.stderr


@needs_native
def test_importing_starts_no_thread_and_kernels_share_torchs_pool() -> None:
    code = """
import os
import torch
threads = lambda: len(os.listdir('/proc/self/task'))
before = threads()
from serverlesslora_kernels import native
from serverlesslora_kernels.linear import linear
assert native.load('linear') and native.load('sgmv')
assert threads() == before, 'loading started threads'
torch.set_num_threads(2)
x, w = torch.randn(2, 512).bfloat16(), torch.randn(1024, 512).bfloat16()
torch.nn.functional.linear(torch.randn(64, 512), torch.randn(512, 512))
pool = threads()
linear(x, w)
assert threads() == pool, 'a second pool'
runtimes = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line}
print(len(runtimes))
"""
    assert run_python(code) == "1"


@needs_native
def test_every_source_compiles_without_warnings(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("the library came from the cache")
    for name in ("linear", "sgmv"):
        source = native.SOURCES / f"{name}.c"
        flags = [flag for flag in native.FLAGS if flag != "-O3"]
        subprocess.run(
            [compiler, *flags, "-O1", "-Werror", "-c", source, "-o", tmp_path / "out.o"], check=True, timeout=120
        )


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library built ahead for every level, as an image has them; of one source, because that takes seconds."""
    if platform.machine() != "x86_64" or native._compiler() is None:
        pytest.skip("needs a C compiler for x86-64")
    folder, sources = tmp_path_factory.mktemp("portable"), tmp_path_factory.mktemp("sources")
    for path in (native.SOURCES / "linear.c", *native.SOURCES.glob("*.h")):
        shutil.copy(path, sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "SOURCES", sources)
        made = native.build_portable(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in made}
    assert len(made) == len(native.LEVELS)
    return folder


@needs_native
@pytest.mark.parametrize("level", native.LEVELS, ids=lambda level: level.name)
def test_a_portable_build_needs_neither_compiler_nor_cache(tmp_path: Path, portable: Path, level: native.Level) -> None:
    if not native.cpu_flags() >= level.needed:
        pytest.skip(f"a CPU without {sorted(level.needed - native.cpu_flags())}")
    code = f"""
import pathlib, torch
from serverlesslora_kernels import linear, native
native.PORTABLE = pathlib.Path({str(portable)!r})
native.cpu_flags = lambda: frozenset({sorted(level.needed)!r})
x, w = torch.randn(3, 256).bfloat16(), torch.randn(512, 256).bfloat16()
assert linear._kernel() is not None
exact = x.double() @ w.double().T
torch.testing.assert_close(linear.linear(x, w).double(), exact, rtol=2**-7, atol=1e-2)
print(native.load("linear")._name)
"""
    loaded = Path(run_python(code, XDG_CACHE_HOME=str(tmp_path), PATH="", CC=""))
    assert loaded == portable / native._portable_name("linear", level)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lacking", ["avx512_bf16", "avx512cd", "abm"])
def test_a_portable_build_is_not_used_where_the_cpu_lacks_a_flag(
    portable: Path, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "PORTABLE", portable)
    best, plain = native.LEVELS
    found = native._portable("linear", best.needed)
    assert found is not None and found.name.startswith("linear-v4-bf16-")
    found = native._portable("linear", best.needed - {lacking})
    assert (found is None) == (lacking in plain.needed)
    assert found is None or not found.name.startswith("linear-v4-bf16-")


def test_a_portable_build_of_other_sources_is_not_used(
    portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "PORTABLE", portable)
    monkeypatch.setattr(native, "SOURCES", shutil.copytree(native.SOURCES, tmp_path / "native"))
    assert native._portable("linear", native.LEVELS[0].needed) is not None
    with (native.SOURCES / "bf16.h").open("a") as header:
        header.write("// another line\n")
    assert native._portable("linear", native.LEVELS[0].needed) is None


def test_a_portable_build_is_taken_before_compiling_and_after_what_was_built_for_this_very_machine(
    tmp_path: Path, portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = native.LEVELS[0]
    monkeypatch.setattr(native, "PORTABLE", portable)
    monkeypatch.setattr("ctypes.CDLL", str)  # what would be loaded
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(native._load_or_build("linear", best.needed)) == str(portable / native._portable_name("linear", best))
    assert list(tmp_path.iterdir()) == []
    native.cache_dir().mkdir(parents=True)
    cached = native.cache_dir() / f"{native._key('linear', best.needed)}.so"
    cached.touch()
    assert str(native._load_or_build("linear", best.needed)) == str(cached)


def test_no_portable_build_uses_what_its_level_does_not_name(portable: Path) -> None:
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    for path in portable.glob("*.so"):
        code = subprocess.run([objdump, "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert ("vdpbf16ps" in code) <= ("-v4-bf16-" in path.name)
        assert not {"tdpbf16ps", "vaddph", "vpdpbusd"} & set(code.split())


def test_key_changes_with_the_cpu_and_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {native._key("linear", frozenset(flags)) for flags in ({"avx2"}, {"avx2", "avx512f"})}
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(native._key("linear", frozenset({"avx2"})))
    assert len(keys) == 3
