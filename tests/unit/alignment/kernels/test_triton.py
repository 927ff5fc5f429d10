"""The fused kernels under Triton's interpreter, outputs and gradients: see interpreted.py, which runs once for all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("interpreted.py")

NORM = {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel"}
ROPE = {"_rotate_kernel"}
SWIGLU = {"_swiglu_fwd_kernel", "_swiglu_bwd_kernel"}
PACKED = {"_swiglu_packed_fwd_kernel", "_swiglu_packed_bwd_kernel"}
SUM = {"_invert_index_kernel", "_weighted_restore_forward_kernel"}
RESTORE = SUM | {"_weighted_restore_backward_kernel"}
KERNELS = {
    "rms_norm": NORM,
    "rope interleaved": ROPE,
    "rope halves": ROPE,
    "swiglu": SWIGLU,
    "swiglu packed": PACKED,
    **{f"permute {route}": SUM for route in ("any", "empty", "one")},
    **{f"restore {route}": RESTORE for route in ("any", "empty", "one")},
    **{f"experts {route}": RESTORE | PACKED for route in ("any", "empty", "one")},
}
CASES = {
    **{f"{name} {dtype}": kernels for name, kernels in KERNELS.items() for dtype in ("float32", "bfloat16")},
    "rms_norm, weight of another dtype bfloat16": NORM,
    "rope interleaved, one table for all rows float32": ROPE,
    "model ernie4_5_moe float32": NORM | ROPE | SWIGLU | PACKED | RESTORE,
    "model qwen3_moe float32": NORM | ROPE | SWIGLU | PACKED | RESTORE,
}
# bf16 has 8 bits: one rounding is 0.4% of a value. Kernels round once where torch rounds up to three times, and the
# experts' chain of two GEMMs and SwiGLU up to six times.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.01}
EXPERTS_BF16 = 0.02


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT)], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_its_reference_and_has_run(case: str, found: dict[str, dict[str, Any]]) -> None:
    dtype = case.rpartition(" ")[2]
    tolerance = EXPERTS_BF16 if case.startswith("experts") and dtype == "bfloat16" else TOLERANCE[dtype]
    assert found[case]["gap"] <= tolerance
    assert set(found[case]["launched"]) == CASES[case]


def test_every_case_is_expected(found: dict[str, dict[str, Any]]) -> None:
    assert found.keys() == CASES.keys()


@pytest.mark.parametrize("step", [1, 2], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_our_kernel_compiles_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int, dtype: str, capability: int
) -> None:
    """To a cubin, with Triton's own assembler: what the interpreter allows, the compiler may not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton 3.9 warns that its default will change
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from alignment.kernels.rope import _rotate_kernel

    constants = {"SIGN": -1, "STEP": step, "ACROSS": 1 if step == 2 else 64, "HEADS": 32, "PAIRS": 64}
    pointers = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    types = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in _rotate_kernel.arg_names}
    source = ASTSource(fn=_rotate_kernel, signature=types, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(compiled.asm["cubin"]) > 1000
