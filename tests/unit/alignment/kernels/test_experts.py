"""The torch side of the experts against transformers' eager loop. Shapes as in alignment.kernels.dispatch."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeExperts

from alignment.kernels import dispatch, experts, swiglu

E, K, D, WIDTH, T = 6, 2, 24, 16, 40


def module(dtype: torch.dtype = torch.float32) -> Any:
    config = Ernie4_5_MoeConfig(hidden_size=D, moe_intermediate_size=WIDTH, moe_num_experts=E, moe_k=K)
    config._experts_implementation = "eager"
    found = Ernie4_5_MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return found.to(dtype)


def chosen(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    match kind:
        case "any":
            return torch.rand(T, E, generator=generator).topk(K).indices
        case "three of six":
            return torch.rand(T, 3, generator=generator).topk(K).indices * 2
        case _:
            return torch.full((T, K), 4)


def gradients(implementation: str, of: Any, expert_TK: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of hidden states, scores and both weights."""
    generator = torch.Generator().manual_seed(2)
    tokens = len(expert_TK)
    hidden_TD = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_()
    score_TK = torch.rand(tokens, K, generator=generator).to(dtype).requires_grad_()
    of.config._experts_implementation = implementation
    out_TD = of(hidden_TD, expert_TK, score_TK)
    direction_TD = torch.randn(tokens, D, generator=generator).to(dtype)
    return [out_TD, *torch.autograd.grad(out_TD, [hidden_TD, score_TK, *of.parameters()], direction_TD)]


@pytest.mark.parametrize("kind", ["any", "three of six", "all to one"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_equals_eager_in_outputs_and_gradients(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Gaps relative to the largest value of each tensor: the gradient of a weight is a sum over up to 80 rows."""
    experts.register()
    of, expert_TK = module(dtype), chosen(kind)
    for found, expected in zip(
        gradients(experts.FUSED, of, expert_TK, dtype), gradients("eager", of, expert_TK, dtype), strict=True
    ):
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_no_tokens_move_no_weight() -> None:
    experts.register()
    out_TD, *slopes = gradients(experts.FUSED, module(), torch.empty(0, K, dtype=torch.int64), torch.float32)
    assert out_TD.shape == (0, D)
    assert [slope.abs().sum().item() for slope in slopes] == [0, 0, 0, 0]


def test_gradient_of_stride_0_is_taken() -> None:
    """`sum` sends back one number seen everywhere; torch's grouped GEMM refuses such a gradient."""
    of, expert_TK = module(), chosen("any")
    score_TK = torch.full((T, K), 0.5)
    slopes = []
    for forward in (experts.experts_forward, ALL_EXPERTS_FUNCTIONS["batched_mm"]):
        hidden_TD = torch.linspace(-1, 1, T * D).view(T, D).requires_grad_()
        forward(of, hidden_TD, expert_TK, score_TK).sum().backward()
        slopes.append(hidden_TD.grad)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-5)


def test_autocast_sets_the_dtype_of_the_products() -> None:
    of, expert_TK = module(), chosen("any")
    hidden_TD, score_TK = torch.ones(T, D), torch.full((T, K), 0.5)
    wide = experts.experts_forward(of, hidden_TD, expert_TK, score_TK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = experts.experts_forward(of, hidden_TD, expert_TK, score_TK)
    rounded = experts.experts_forward(module(torch.bfloat16), hidden_TD, expert_TK, score_TK)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, rounded)
    assert not torch.equal(narrow, wide)


def test_routes_by_hand() -> None:
    """Tokens 0, 1, 2 to experts (1, 3), (1, 0), (3, 1): rows are 0: t1; 1: t0, t1, t2; 3: t0, t2."""
    to = dispatch.routes(torch.tensor([[1, 3], [1, 0], [3, 1]]), 4)
    assert to.tokens().tolist() == [1, 0, 1, 2, 0, 2]
    assert to.row_TK.tolist() == [[1, 4], [2, 0], [5, 3]]
    assert to.ends_E.tolist() == [1, 4, 4, 6]
    assert to.ends_E.dtype == torch.int32


def test_dispatch_and_its_gradients_by_hand() -> None:
    to = dispatch.routes(torch.tensor([[1, 0], [1, 1]]), 2)  # rows: t0 slot 1; t0 slot 0, t1 slot 0, t1 slot 1
    x_TD = torch.tensor([[1.0], [10.0]], requires_grad=True)
    rows_RD = dispatch.permute(x_TD, to)
    assert rows_RD.flatten().tolist() == [1, 1, 10, 10]
    (slope,) = torch.autograd.grad(rows_RD, x_TD, torch.tensor([[1.0], [2.0], [4.0], [8.0]]))
    assert slope.flatten().tolist() == [3, 12]

    rows_RD = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    score_TK = torch.tensor([[0.5, 0.25], [2.0, 1.0]], requires_grad=True)
    out_TD = dispatch.restore(rows_RD, score_TK, to)
    assert out_TD.flatten().tolist() == [2 * 0.5 + 1 * 0.25, 3 * 2 + 4 * 1]
    of_rows, of_scores = torch.autograd.grad(out_TD, [rows_RD, score_TK], torch.tensor([[1.0], [10.0]]))
    assert of_rows.flatten().tolist() == [0.25, 0.5, 20, 10]
    assert of_scores.tolist() == [[2, 1], [30, 40]]


def test_bf16_rows_are_summed_in_float32() -> None:
    """256 + 1 + 1 in bf16 stays 256 where every sum is rounded; 258 is a bf16 number."""
    to = dispatch.routes(torch.tensor([[0, 1, 2]]), 3)
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert dispatch.restore(rows_RD, torch.ones(1, 3), to).item() == 258
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dispatch.permute(x_TD, to).backward(rows_RD)
    assert x_TD.grad is not None and x_TD.grad.item() == 258


def test_packed_swiglu_and_its_gradient_in_float64() -> None:
    gate_up = torch.randn(5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(swiglu.swiglu_packed, (gate_up,))
    expected = torch.nn.functional.silu(gate_up[:, :7]) * gate_up[:, 7:]
    torch.testing.assert_close(swiglu.swiglu_packed(gate_up), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_bias": True}, "without biases"),
        ({"is_transposed": True}, "without biases"),
        ({"act_fn": torch.nn.GELU()}, "not SwiGLU"),
        ({}, None),
    ],
)
def test_experts_that_cannot_run_are_named(change: dict[str, Any], reason: str | None) -> None:
    of = module()
    for name, value in change.items():
        setattr(of, name, value)
    found = experts.why_not(of, on_gpu=False)
    assert found is None if reason is None else reason in str(found)


def test_a_gpu_wants_rows_of_16_bytes() -> None:
    assert experts.why_not(module(torch.bfloat16), on_gpu=True) is None  # 48 and 32 bytes
    config = Ernie4_5_MoeConfig(hidden_size=D, moe_intermediate_size=20, moe_num_experts=E, moe_k=K)
    narrow = Ernie4_5_MoeExperts(config).to(torch.bfloat16)  # 40 bytes
    assert experts.why_not(narrow, on_gpu=False) is None
    assert "multiple of 16 bytes, not widths of 24 and 20" in str(experts.why_not(narrow, on_gpu=True))
