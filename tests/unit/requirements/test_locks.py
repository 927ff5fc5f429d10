"""pyproject.toml, the locks and the tree say the same."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import find_packages

CHECKOUT = Path(__file__).parents[3]
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def project() -> dict[str, Any]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())


def pins(device: str) -> list[tuple[str, str]]:
    """(name, version) of every pin, those of common.txt included."""
    text = "".join((CHECKOUT / "requirements" / f"{lock}.txt").read_text() for lock in ("common", device))
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-r common.txt"))]
    parts = [re.fullmatch(r"([\w.-]+)={2,3}([\w.+]+)", line) for line in lines]
    assert all(parts), [line for line, part in zip(lines, parts, strict=True) if part is None]
    return [(canonicalize_name(part[1]), part[2]) for part in parts if part]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_lock_pins_each_package_once_and_leaves_three_out(device: str) -> None:
    names = [name for name, _ in pins(device)]
    assert sorted(names) == sorted(set(names))
    assert not LEFT_OUT & set(names)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_lock_satisfies_pyproject(device: str) -> None:
    metadata = project()["project"]
    extras = metadata["optional-dependencies"]
    wanted = [Requirement(line) for line in (*metadata["dependencies"], *extras[device], *extras["dev"])]
    versions = dict(pins(device))
    for requirement in wanted:
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the {device} lock"
        assert requirement.specifier.contains(Version(version), prereleases=True), f"{requirement}, locked {version}"


def test_pyproject_names_every_package() -> None:
    tops = ("alignment", "data_builders", "dpo", "reward", "sft")
    there = find_packages(str(CHECKOUT), include=[*tops, *(f"{top}.*" for top in tops)])
    assert sorted(project()["tool"]["setuptools"]["packages"]) == sorted(there)


def test_no_source_of_packages_is_named_but_for_torchs_own() -> None:
    files = [CHECKOUT / "pyproject.toml", CHECKOUT / "Makefile", *(CHECKOUT / "requirements").glob("*.*")]
    addresses = [address for file in files for address in re.findall(r"\w+://[^\s\"']+", file.read_text())]
    assert addresses == ["https://download.pytorch.org/whl/cpu"]
