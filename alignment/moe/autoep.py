"""Teaches DeepSpeed AutoEP the Ernie4_5_Moe architecture, and checks what AutoEP did to a model.

AutoEP replaces every MoE block of a Hugging Face model by an `AutoEPMoELayer` that holds 1/EP of the experts and
exchanges tokens over the expert group. DeepSpeed has presets for Mixtral, Qwen2/3-MoE and DeepSeek-V2/V3; the one for
Ernie4_5_Moe is ours. It touches private names of DeepSpeed, so its version is pinned.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from alignment.errors import UserError
from alignment.linear import Fp32Linear
from alignment.moe.dispatch import install_cpu_dispatch

DEEPSPEED_VERSION = "0.19.8"
ERNIE = "ernie4_5_moe"


def install_autoep() -> None:
    """Give AutoEP the preset of Ernie4_5_Moe, routers with float32 gates, and our token exchange on CPU.

    Doing it twice changes nothing.

    Raises:
        UserError: another version of DeepSpeed is installed, or its private names have moved.
    """
    import deepspeed

    if deepspeed.__version__.split("+")[0] != DEEPSPEED_VERSION:
        raise UserError(
            f"expert parallelism is written for deepspeed {DEEPSPEED_VERSION}, found {deepspeed.__version__}\n"
            f"install deepspeed=={DEEPSPEED_VERSION}, or train without expert parallelism"
        )
    try:
        from deepspeed.module_inject import auto_ep_layer
        from deepspeed.module_inject.auto_ep_presets.base import MoEModelPreset
        from deepspeed.module_inject.auto_ep_presets.registry import _PRESET_ADAPTERS, PRESET_MODELS

        adapter = _ernie_adapter()
        router = _fp32_router()
    except ImportError as error:
        raise UserError(f"the deepspeed installed here lacks a name that expert parallelism needs: {error}") from error
    install_cpu_dispatch()
    vars(auto_ep_layer).update(TokenChoiceTopKRouter=router)  # the class that AutoEP builds every router from
    _PRESET_ADAPTERS[ERNIE] = adapter
    PRESET_MODELS[ERNIE] = MoEModelPreset(
        moe_layer_pattern=r"model\.layers\.\d+\.mlp",
        router_pattern="gate",
        experts_pattern="experts",
        expert_storage="fused_3d",
        expert_w1="gate_up_proj",
        expert_w2="down_proj",
        expert_w3=None,
        num_experts_attr="moe_num_experts",
        top_k_attr="moe_k",
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        has_shared_experts=True,
        shared_experts_pattern="shared_experts",
        supports_expert_bias=False,
        preset_adapter=ERNIE,
        hf_model_types=(ERNIE,),
    )


def _fp32_router() -> type[nn.Module]:
    """AutoEP's router with a float32 gate: stock, it multiplies in the model's dtype and only scores in float32."""
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    class Fp32Router(TokenChoiceTopKRouter):  # type: ignore[misc]  # deepspeed has no types
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.gate = Fp32Linear(options["dim"], options["num_experts"], bias=options["gate_bias"])

    return Fp32Router


def _ernie_adapter() -> Any:
    """What differs between Ernie's router and AutoEP's, put right once all blocks are replaced (one call a model)."""
    from deepspeed.module_inject.auto_ep_presets.base import TransformersTopLevelRouterLogitsAdapter

    class ErnieAdapter(TransformersTopLevelRouterLogitsAdapter):  # type: ignore[misc]  # deepspeed has no types
        def retarget_transformers_output_recorders(
            self, model: nn.Module, spec: Any, replacement: nn.Module, *args: Any
        ) -> None:
            for _, layer in autoep_layers(model):
                bias = cast(Any, layer).router.e_score_correction_bias
                # Ernie stores [1, E]; AutoEP adds a dimension of its own, and [1, 1, E] + [T, E] would be [1, T, E].
                bias.data = bias.data.reshape(-1)
            super().retarget_transformers_output_recorders(model, spec, replacement, *args)

    return ErnieAdapter(display_name="Ernie4_5_Moe", hf_model_types=(ERNIE,), class_name_fragments=("Ernie4_5_Moe",))


def freeze_correction_bias(model: nn.Module) -> None:
    """Freeze the routers' score correction biases: no gradient reaches them, yet `from_pretrained` unfreezes them."""
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.requires_grad_(False)


def moe_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's mixture-of-experts blocks by name: modules with a child `experts`, replaced by AutoEP or not."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            yield name, module


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the routed experts; of AutoEP's layers, the ones that this rank holds."""
    return [parameter for _, block in moe_blocks(model) for parameter in block.get_submodule("experts").parameters()]


def autoep_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of the model that AutoEP has replaced, by name."""
    for name, module in model.named_modules():
        if is_autoep_layer(module):
            yield name, module


def is_autoep_layer(module: nn.Module) -> bool:
    return getattr(module, "_is_autoep_layer", False)


def check_sizes(num_experts: int, ep_size: int, world_size: int) -> None:
    """Raise UserError unless the expert-parallel size divides the experts and the processes."""
    if num_experts % ep_size:
        divisors = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise UserError(
            f"expert_parallel.autoep_size: {ep_size} does not divide the model's {num_experts} experts; "
            f"valid sizes: {', '.join(map(str, divisors))}"
        )
    if world_size % ep_size:
        raise UserError(f"expert_parallel.autoep_size: {ep_size} does not divide the {world_size} processes launched")


def check_model(model: nn.Module, ep_size: int, world_size: int) -> None:
    """Raise UserError where the model, not yet replaced, cannot be trained with this expert-parallel size."""
    if any(autoep_layers(model)):
        raise UserError(
            "the model is expert-parallel before its training: with precompute_ref_log_probs TRL made an engine of it\n"
            "set precompute_ref_log_probs to false, and give a ref_model or the reference log-probs"
        )
    blocks = list(moe_blocks(model))
    if not blocks:
        raise UserError(f"expert parallelism was asked for, but {type(model).__name__} has no mixture-of-experts layer")
    for _, block in blocks:
        experts = cast(Any, block.experts)
        check_sizes(len(experts) if isinstance(experts, nn.ModuleList) else experts.num_experts, ep_size, world_size)


def check_replaced(model: nn.Module) -> None:
    """Raise UserError unless AutoEP has replaced every MoE block of the model."""
    replaced = {name for name, _ in autoep_layers(model)}
    left = [name for name, _ in moe_blocks(model) if name not in replaced]
    if left or not replaced:
        raise UserError(
            f"expert parallelism was asked for, but AutoEP replaced {len(replaced)} of {len(replaced) + len(left)} "
            f"MoE layers of {type(model).__name__} (left: {', '.join(left[:3])})"
        )
