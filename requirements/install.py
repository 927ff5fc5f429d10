"""Makes .venv: the packages of the lock, then the project itself, with the standard library only. `make setup` runs it.

    python requirements/install.py [--device cpu|cuda]

.venv/installed.json says what the environment holds and is written last. Where it says what is wanted, nothing is done.
An environment without it was interrupted, or made otherwise, and is made afresh; one whose lock has changed is updated
in place.
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.json"
COMMON_LOCK = ROOT / "requirements" / "common.txt"
BUILD_TOOLS = ("packaging", "setuptools", "wheel")

# The one address in this repository. torch's CPU build is not where pip usually looks, so this is asked for that one
# package, and only when pip's configured sources do not have it.
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """What the user has to know or do, in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make .venv from the lock.")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where nvidia-smi finds a GPU")
    try:
        install(parser.parse_args(argv).device)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def install(asked: str | None) -> None:
    """Brings .venv to what the lock says: for the device asked for, else the one .venv is for, else the machine's."""
    installed = read_stamp()
    wanted = describe(asked or installed.get("device") or find_device())
    if installed == wanted:
        return
    check_machine(wanted["device"])
    afresh = not all(installed.get(key) == wanted[key] for key in ("device", "root"))
    STAMP.unlink(missing_ok=True)
    if afresh:
        print(f"setup: making .venv with Python {platform.python_version()}, {wanted['device']} packages", flush=True)
        run(sys.executable, "-m", "venv", "--clear", str(VENV))
    if afresh or installed["lock"] != wanted["lock"]:
        install_lock(wanted["device"])
    run_pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    write_stamp(wanted)


def read_stamp() -> dict[str, str]:
    """What .venv holds; empty when there is none, or when its installation did not finish."""
    if not venv_python().exists() or not STAMP.exists():
        return {}
    stamp: dict[str, str] = json.loads(STAMP.read_text())
    return stamp


def write_stamp(stamp: dict[str, str]) -> None:
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps(stamp, indent=1) + "\n")
    part.replace(STAMP)


def describe(device: str) -> dict[str, str]:
    """What a complete environment is made from. The folder counts: a copied .venv runs the code it was copied from."""
    lock = COMMON_LOCK.read_bytes() + device_lock(device).read_bytes()
    return {
        "device": device,
        "root": str(ROOT),
        "lock": hashlib.sha256(lock).hexdigest(),
        "project": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
    }


def find_device() -> str:
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listing.returncode == 0 and "GPU 0" in listing.stdout else "cpu"


def check_machine(device: str) -> None:
    """Raises SetupError for what pip cannot bring."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise SetupError(
            f"needs Python 3.11 or 3.12, not {platform.python_version()}; name one with PYTHON=/path/to/python"
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SetupError(f"the locks are for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    missing = missing_system_packages(device)
    if missing:
        packages = " ".join(missing.values())
        raise SetupError(f"missing {', '.join(missing)}; on Debian or Ubuntu: apt-get install {packages}")


def missing_system_packages(device: str) -> dict[str, str]:
    """What is missing -> the Debian package that brings it.

    torch and DeepSpeed compile small C++ kernels while they run (vLLM's sampler on CPU is one), which takes a compiler
    and Python's headers; vLLM's CPU library is linked with libnuma.
    """
    missing = {}
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        missing["g++"] = "g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing["Python.h"] = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    if device == "cpu" and not has_library("libnuma.so.1"):
        missing["libnuma.so.1"] = "libnuma1"
    return missing


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def install_lock(device: str) -> None:
    """One pip call for the lock, after what has to come first: build tools, DeepSpeed, and torch's CPU build."""
    common = read_pins(COMMON_LOCK)
    run_pip("--no-deps", *(common[name] for name in BUILD_TOOLS))
    # DeepSpeed comes as source. Its build uses torch's extension builder where it finds torch, and fails with it.
    run_pip("--no-deps", "--no-build-isolation", common["deepspeed"])
    if device == "cpu":
        install_torch_cpu(read_pins(device_lock(device))["torch"])
    run_pip("--no-deps", "--no-build-isolation", "--requirement", str(device_lock(device)))


def install_torch_cpu(pin: str) -> None:
    if pip("--no-deps", pin) == 0:
        return
    print(f"setup: pip's sources have no {pin}; taking it from PyTorch's CPU wheel index", flush=True)
    run_pip("--no-deps", "--index-url", PYTORCH_CPU_INDEX, pin)


def device_lock(device: str) -> Path:
    return ROOT / "requirements" / f"{device}.txt"


def read_pins(lock: Path) -> dict[str, str]:
    """Name -> its pin as pip takes it, e.g. "wheel" -> "wheel==0.48.0"."""
    lines = (line.strip() for line in lock.read_text().splitlines())
    return {line.split("=", 1)[0]: line for line in lines if line and not line.startswith(("#", "-"))}


def venv_python() -> Path:
    return VENV / "bin" / "python"


def pip(*arguments: str) -> int:
    command = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode


def run_pip(*arguments: str) -> None:
    if code := pip(*arguments):
        raise SetupError(f"pip ended with code {code}, its reason is above; the same command starts over")


def run(*command: str) -> None:
    if code := subprocess.run(command, check=False).returncode:
        raise SetupError(f"'{' '.join(command)}' ended with code {code}, its reason is above")


if __name__ == "__main__":
    sys.exit(main())
