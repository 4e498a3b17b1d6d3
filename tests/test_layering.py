"""Who may import whom, what stays free of torch, and which folders must not become packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "serverlesslora": ROOT / "serverlesslora",
    "serverlesslora_ipc": ROOT / "ipc" / "serverlesslora_ipc",
    "serverlesslora_kernels": ROOT / "kernels" / "serverlesslora_kernels",
    "serverlesslora_loadgen": ROOT / "loadgen" / "serverlesslora_loadgen",
}
ALLOWED: dict[str, set[str]] = {
    "serverlesslora": {"serverlesslora_ipc", "serverlesslora_kernels"},
    "serverlesslora_ipc": set(),
    "serverlesslora_kernels": set(),
    "serverlesslora_loadgen": set(),
}
HEAVY = {"torch", "transformers", "peft", "numpy", "tokenizers"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in PACKAGES[package].rglob("*.py"):
        others = imported(path) & (PACKAGES.keys() - {package})
        assert others <= ALLOWED[package], f"{path} imports {others - ALLOWED[package]}"


@pytest.mark.parametrize("folder", ["ipc", "kernels", "loadgen"])
def test_source_roots_are_not_packages(folder: str) -> None:
    # `kernels` is also a PyPI package that transformers imports; a package of that name here would shadow it.
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "tests" / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "serverlesslora.gateway.server",
        "serverlesslora.cli.main",
        "serverlesslora.scheduler.policies",
        "serverlesslora.metering.ledger",
        "serverlesslora.tenancy.keyring",
        "serverlesslora",
    ],
)
def test_the_gateway_never_imports_torch(module: str) -> None:
    code = f"import {module}, sys; print(' '.join(sorted(set(sys.modules) & {HEAVY!r})))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == []


def test_nothing_unpickles() -> None:
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            assert not imported(path) & {"pickle", "dill", "cloudpickle"}, path
            assert "torch.load(" not in path.read_text(), path
