"""The packed trainer: its log by hand, the probe before the first step, the order of packs, resuming, and its loss."""

import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    Ernie4_5_MoeConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig as TRLConfig

from alignment import attention
from alignment.config import RouterConfig
from alignment.errors import UserError
from alignment.packing import PackingPlan
from sft.cache import SourceRows, TokenizedRows
from sft.data import Batch, PackedRows, collate
from sft.rendering import SCHEMA
from sft.trainer import PackedSFTTrainer

VOCAB, CAPACITY = 64, 10
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
LLAMA = LlamaConfig(**SHAPE)
EXPERTS = {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}
# Samples of these lengths; six packs in steps of two, the last pack a filler.
LENGTHS = [6, 2, 5, 4, 4, 9, 8, 3, 7]
PACKS = [[0, 1], [2, 3], [4, 7], [5], [6], []]
WIDTHS = [10, 10, 10, 10, 8, 8]


def plan() -> PackingPlan:
    held = [[LENGTHS[row] for row in pack] for pack in PACKS]
    return PackingPlan(
        order=np.array([row for pack in PACKS for row in pack], dtype=np.int64),
        starts=np.cumsum([0, *(len(pack) for pack in PACKS)]),
        widths=np.array(WIDTHS),
        tokens=np.array([sum(pack) for pack in held]),
        attention=np.array([sum(length**2 for length in pack) for pack in held]),
        capacity=CAPACITY,
        packs_per_step=2,
    )


class Recorded(PackedRows):
    """Notes which packs are read."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        rows = [
            {"input_ids": random.integers(2, VOCAB, length).tolist(), "trained": [at % 3 > 0 for at in range(length)],
             "length": length, "trained_tokens": sum(at % 3 > 0 for at in range(length)), "reason": None,
             "place": "", "id": None}
            for length in LENGTHS
        ]  # fmt: skip
        batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
        super().__init__(TokenizedRows([SourceRows("rows", [batch])]), plan(), None, 0)
        self.read: list[int] = []

    def __getitem__(self, number: int) -> Batch:
        self.read.append(number)
        return super().__getitem__(number)


@pytest.fixture(autouse=True)
def _segments() -> Iterator[None]:
    attention.register()
    yield
    attention.register()


def make(config: PreTrainedConfig, how: str = attention.SEGMENTS) -> PreTrainedModel:
    torch.manual_seed(0)
    of_its_own = copy.deepcopy(config)  # the model writes the attention into it
    model: PreTrainedModel = AutoModelForCausalLM.from_config(of_its_own, attn_implementation=how)
    return model


def trainer(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: PreTrainedConfig = LLAMA,
    packs: PackedRows | None = None,
    **arguments: Any,
) -> PackedSFTTrainer:
    model = make(config)
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "learning_rate": 1e-2, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 1, "num_train_epochs": 1, "report_to": [],
        "remove_unused_columns": False, "bf16": False, "dataloader_pin_memory": False, "disable_tqdm": True,
        "max_length": None, "router_aux_loss_coef": 0.0, "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return PackedSFTTrainer(
        model=model,
        args=TRLConfig(**defaults | arguments),
        packs=packs or Recorded(),
        processing_class=tokenizer,
        router=RouterConfig(),
    )


def lines(made: PackedSFTTrainer) -> list[dict[str, float]]:
    return [line for line in made.state.log_history if "loss" in line]


# the figures of a log line


def test_figures_of_two_ranks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 2 (the second and third), half a second each.

    Packs of 4 + 3 and 9 tokens, both 10 wide, then of 8 and 0, both 8 wide: 24 valid of 36, of a capacity of 40.
    Rank 0 has 7 and 8 tokens, rank 1 has 9 and 0. The slower has 9 + 8 = 17, the mean is 12. Attention costs 25 and 81,
    then 64 and 0: the slower 145, the mean 85.
    """
    now = iter([100.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    made = cast(Any, SimpleNamespace(
        plan=plan(), state=SimpleNamespace(global_step=3), args=SimpleNamespace(world_size=2), _logged=(1, 99.0)
    ))  # fmt: skip
    assert PackedSFTTrainer._figures(made) == pytest.approx(
        {
            "valid_tokens_per_second": 24,
            "tokens_per_second": 36,
            "packing/padding_share": 1 - 24 / 36,
            "packing/utilisation": 24 / 40,
            "packing/imbalance_tokens": 17 / 12 - 1,
            "packing/imbalance_attention": 145 / 85 - 1,
        }
    )
    assert made._logged == (3, 100.0)


def test_each_line_is_of_the_steps_since_the_last_also_after_a_resume(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Valid tokens of the three steps: 8 + 9 of 20, 7 + 9 of 20, 8 of 16; packs hold 20 a step."""
    whole = trainer(tmp_path, tiny_tokenizer)
    whole.train()
    shares = [[line[f"packing/{name}"] for line in lines(whole)] for name in ("padding_share", "utilisation")]
    assert shares == [pytest.approx([3 / 20, 4 / 20, 8 / 16]), pytest.approx([17 / 20, 16 / 20, 8 / 20])]
    assert all(line["packing/imbalance_attention"] == 0 for line in lines(whole)), "one rank waits for none"
    assert [line["tokens_per_second"] / line["valid_tokens_per_second"] for line in lines(whole)] == pytest.approx(
        [20 / 17, 20 / 16, 2]
    )

    folder = tmp_path / "every second step"
    several = trainer(folder, tiny_tokenizer, logging_steps=2)
    several.train()
    assert [line["packing/padding_share"] for line in lines(several)] == pytest.approx([7 / 40])
    resumed = trainer(folder, tiny_tokenizer, logging_steps=2)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert [line["packing/padding_share"] for line in lines(resumed)] == pytest.approx([4 / 20]), "step 2 alone"


# the order of packs


def test_packs_are_read_in_order_and_none_before_the_resume_point(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    packs = Recorded()
    whole = trainer(tmp_path, tiny_tokenizer, packs=packs)
    packs.read.clear()  # TRL looks at the first row when it is made
    whole.train()
    assert packs.read == [0, 1, 2, 3, 4, 5]
    resumed = trainer(tmp_path, tiny_tokenizer, packs=packs)
    packs.read.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert packs.read == [2, 3, 4, 5]
    assert [line["loss"] for line in lines(resumed)] == [line["loss"] for line in lines(whole)]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_r_takes_every_other_pack(rank: int, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    packs = Recorded()
    made = trainer(tmp_path, tiny_tokenizer, packs=packs)
    loader = DataLoader(packs.as_dataset(), batch_size=1, sampler=made._get_train_sampler(), collate_fn=collate)
    shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
    packs.read.clear()
    assert len(list(shard)) == 3
    assert packs.read == [rank, rank + 2, rank + 4]


# refusals


def leaky(_module: Any, query: Any, key: Any, value: Any, _mask: Any, *, scaling: float, **_: Any) -> Any:
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("broken", ["segments", "sdpa"])
def test_attention_over_the_whole_pack_is_refused_before_the_first_step(
    broken: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Our attention broken, or transformers' own in its place, which our batches' mask keeps from seeing samples."""
    made = trainer(tmp_path, tiny_tokenizer)
    before = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    if broken == "segments":
        AttentionInterface.register(attention.SEGMENTS, leaky)
    else:
        made.model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="packed samples are not kept apart"):
        made.train()
    assert made.state.global_step == 0 and not lines(made)
    assert all(torch.equal(weight, before[name]) for name, weight in made.model.state_dict().items())


def test_ranks_that_take_themselves_for_alone_are_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without expert parallelism too: each would train alone on all packs."""
    TRLConfig(output_dir=str(tmp_path), bf16=False).world_size  # noqa: B018, accelerate now knows of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched, but the trainer sees 1"):
        trainer(tmp_path, tiny_tokenizer)


# the loss


def alone(model: PreTrainedModel, packs: PackedRows, numbers: Sequence[int]) -> torch.Tensor:
    """The mean over the labelled tokens of these packs' samples, each sample through the plain model by itself."""
    total, count = torch.zeros(()), 0
    for row in np.concatenate([packs.plan.pack(number) for number in numbers]).tolist():
        ids, trained = packs.rows.take([row])
        ids_T = torch.from_numpy(ids.astype(np.int64))
        logits = model(input_ids=ids_T[None]).logits[0]
        labelled = torch.from_numpy(trained)[1:]
        total = total + cross_entropy(logits[:-1][labelled], ids_T[1:][labelled], reduction="sum")
        count += int(labelled.sum())
    return total / count


@pytest.mark.parametrize(
    "config",
    [LLAMA, Ernie4_5_MoeConfig(**SHAPE, **EXPERTS, head_dim=8), GraniteConfig(**SHAPE, logits_scaling=4.0)],
    ids=["dense", "experts", "scaled logits"],
)
def test_a_step_is_that_of_its_samples_alone(
    config: PreTrainedConfig, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Loss and gradient norm of the first step, and the loss of the last, which holds a filler."""
    packs = Recorded()
    made = trainer(tmp_path, tiny_tokenizer, config, packs, save_steps=2, max_grad_norm=1e9)
    plain = make(config, "sdpa")
    expected = alone(plain, packs, [0, 1])
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    made.router = None  # its losses have tests of their own
    made.train()
    first, _, last = lines(made)
    assert first["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), abs=1e-5)
    plain.load_state_dict(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict())
    assert last["loss"] == pytest.approx(alone(plain, packs, [4, 5]).item(), abs=1e-5)
