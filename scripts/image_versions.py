"""Prints the versions of everything the server needs as they are installed here, for the image to install the same.

    .venv/bin/python scripts/image_versions.py > deploy/constraints.txt

torch is left out, whose version and build the Dockerfile names, and with it what torch asks for by exact version.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
OWN = ("torch", "triton", "nvidia-", "cuda-")
HEADER = "# Versions in the image: made by scripts/image_versions.py where the tests had passed."


def asked_for() -> Iterator[Requirement]:
    """What the package needs, always or with one of its extras."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    for each in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, each)


def versions() -> dict[str, str]:
    """Name to version, of what is asked for and, in turn, asks for more. What is not installed is left out."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    left = list(asked_for())
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        key = (name, frozenset(wanted.extras))
        if key in seen or name.startswith(OWN):
            continue
        seen.add(key)
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed here and stays open", file=sys.stderr)
            continue
        found[name] = installed.version
        for requirement in map(Requirement, installed.requires or ()):
            extras = ("", *wanted.extras)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(requirement)
    return found


if __name__ == "__main__":
    print(HEADER, *sorted(f"{name}=={version}" for name, version in versions().items()), sep="\n")
