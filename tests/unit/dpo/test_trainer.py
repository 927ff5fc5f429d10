"""PreferenceTrainer in one process, on a tiny Ernie4_5_Moe."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import dpo.trainer
from alignment.config import RouterConfig
from alignment.errors import UserError
from dpo.alarm import ALARM_STEPS
from dpo.arguments import PreferenceArguments
from dpo.data import PairCollator, tokenize_pairs
from dpo.forward import Completions, Way
from dpo.ot import ot_token_weights
from dpo.train import ExpertParallelPreferenceTrainer
from dpo.trainer import PreferenceTrainer

Make = Callable[..., PreferenceTrainer]


@pytest.fixture
def pairs(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> Dataset:
    return tokenize_pairs(rows, tokenizer, max_length=100)[0]


@pytest.fixture
def make(ernie: PreTrainedModel, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Make:
    """Trainers that all start from the same weights."""

    def make(
        model: PreTrainedModel | None = None,
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        reference_hash: str | None = None,
        **options: Any,
    ) -> PreferenceTrainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "per_device_train_batch_size": 7, "per_device_eval_batch_size": 7, "learning_rate": 0.1,
            "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "num_train_epochs": 2,
            "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 1,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        return PreferenceTrainer(
            model or copy.deepcopy(ernie),
            PreferenceArguments(**(settings | options)),
            train_dataset=pairs,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            ref_model=ref_model,
            reference_hash=reference_hash,
        )

    return make


def trained(trainer: PreferenceTrainer, **options: Any) -> dict[str, Tensor]:
    trainer.train(**options)
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer: PreferenceTrainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def test_first_step_is_log_2_and_training_widens_the_margin(make: Make) -> None:
    trainer = make(beta=0.5, num_train_epochs=10)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-9)
    assert logged(trainer, "loss")[-1] < 0.5
    assert logged(trainer, "rewards/margins")[-1] > 0.4
    assert logged(trainer, "rewards/accuracies")[-1] == 1.0
    assert logged(trainer, "kl")[-1] > 0
    assert logged(trainer, "logps_per_token/chosen")[-1] > logged(trainer, "logps_per_token/chosen")[0]
    assert logged(trainer, "pairs") == [7.0] * 10
    assert 0 < logged(trainer, "ot/mass")[0] < 3
    assert logged(trainer, "ot/spread")[0] > 0.01
    assert logged(trainer, "ot/fallbacks") == logged(trainer, "ot/empty") == [0.0] * 10


def test_transport_and_likelihood_of_a_batch_against_plain_forwards(make: Make, pairs: Dataset) -> None:
    """Hidden states from `output_hidden_states`, log-probabilities from whole logits, and a reference that differs."""
    reference_model, beta, nll_weight = make().model, 0.5, 0.3
    trainer = make(beta=beta, nll_weight=nll_weight, ot_reg=0.1)
    trainer.prepare_references()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trainer.model.train()
    batch: Any = PairCollator(pad_token_id=0, packed=True)(pairs.to_list())
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7.0))
    assert trainer.model.config._attn_implementation == "segments"
    trainer.model.set_attn_implementation("sdpa")

    expected = []
    for pair in pairs.to_list():
        sides = []
        for key in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[key]])
            start = len(pair["prompt_ids"])
            tokens = (0, range(start - 1, ids.shape[1] - 1), ids[0, start:])
            with torch.no_grad():
                outputs = trainer.model(ids, output_hidden_states=True)
                reference = reference_model(ids).logits.log_softmax(-1)[tokens]
            logps = outputs.logits.log_softmax(-1)[tokens]
            sides.append((outputs.hidden_states[-1][:, start - 1 : -1], logps, logps - reference))
        (h_c, logps_c, q_c), (h_r, _, q_r) = sides
        w_c, w_r, _ = ot_token_weights(h_c, h_r, torch.ones(h_c.shape[:2]), torch.ones(h_r.shape[:2]), reg=0.1)
        margin = beta * ((w_c[0] * q_c).sum() - (w_r[0] * q_r).sum())
        expected.append(math.log1p(math.exp(-margin)) - nll_weight * logps_c.mean().item())
    assert loss.item() == pytest.approx(sum(expected) / 7, abs=1e-5)
    assert max(expected) - min(expected) > 0.05


@pytest.mark.parametrize("loss", ["ot_dpo", "dpo"])
def test_accumulation_with_a_filler_is_the_one_batch_step(make: Make, loss: str, tmp_path: Path) -> None:
    """Seven pairs in one batch against 2 + 2 + 2 + (1 and a filler)."""
    whole = make(loss_type=[loss], nll_weight=0.2)
    weights = trained(whole)
    parts = make(
        loss_type=[loss], nll_weight=0.2, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        output_dir=str(tmp_path / "parts"),
    )  # fmt: skip
    assert len(parts.train_dataset) == 8
    torch.testing.assert_close(trained(parts), weights, rtol=0, atol=1e-5)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    for key in ("pairs", "rewards/margins", "nll"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), abs=1e-5)


@pytest.mark.parametrize("family", ["ernie", "dense"])
def test_padded_rows_train_as_packed_ones_do(
    family: str, make: Make, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two epochs of accumulated micro-batches, reference included, the last one with a filler."""
    model = request.getfixturevalue(family)
    settings = {"nll_weight": 0.2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    packed = make(copy.deepcopy(model), **settings)
    weights = trained(packed)
    monkeypatch.setattr(dpo.trainer, "choose_way", lambda *_: Way(padded="asked for"))
    padded = make(model, **settings, output_dir=str(tmp_path / "padded"))
    torch.testing.assert_close(trained(padded), weights, rtol=0, atol=1e-5)
    assert [trainer.data_collator.packed for trainer in (packed, padded)] == [True, False]
    assert packed.forward_metrics == {"forward.padded": 0, "forward.whole_logits": 0}
    assert padded.forward_metrics == packed.forward_metrics | {"forward.padded": 1, "forward.reason": "asked for"}
    for key in ("loss", "rewards/margins", "ot/mass", "kl"):
        assert logged(padded, key) == pytest.approx(logged(packed, key), abs=1e-5), key


def test_no_mix_is_dpo_and_transport_is_not(make: Make) -> None:
    plain, unmixed, mixed = trained(make(loss_type=["dpo"])), trained(make(ot_mix=0.0)), trained(make())
    torch.testing.assert_close(unmixed, plain, rtol=0, atol=0)
    assert max((mixed[name] - plain[name]).abs().max() for name in plain) > 1e-3


def test_a_pair_without_weights_is_named_by_its_id(make: Make, pairs: Dataset) -> None:
    trainer = make()
    mask, hidden = torch.ones(6, 3, dtype=torch.bool), torch.ones(6, 3, 8)
    hidden[4, 1, 0] = math.nan  # of the rejected completion of the second of three pairs
    with pytest.raises(UserError, match="^row row-5: its hidden states are not finite"):
        trainer._token_weights(Completions(torch.zeros(6, 3), mask, hidden), torch.tensor([2, 5, 3]))


def test_a_resumed_run_ends_as_an_uninterrupted_one(make: Make, dense: PreTrainedModel, tmp_path: Path) -> None:
    """A dense model: transformers' own resume leaves stacked experts out, which is alignment.moe's to mend."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 5}
    straight = make(copy.deepcopy(dense), **settings)
    weights = trained(straight)
    assert straight.state.global_step == 8
    checkpoint = str(tmp_path / "run" / "checkpoint-5")  # in the second epoch
    file = tmp_path / "run" / "reference_logps.train.safetensors"
    before = file.stat().st_mtime_ns
    resumed = trained(make(copy.deepcopy(dense), **settings), resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(resumed, weights, rtol=0, atol=1e-6)
    assert file.stat().st_mtime_ns == before
    file.unlink()
    with pytest.raises(UserError, match="missing, and the weights have moved since step 0"):
        make(dense, **settings).train(resume_from_checkpoint=checkpoint)


def test_a_reference_of_other_weights_is_refused(make: Make, ernie: PreTrainedModel) -> None:
    make().prepare_references()
    with torch.no_grad():
        ernie.lm_head.weight[0, 0] += 1
    with pytest.raises(UserError, match="made with other weights"):
        make(ernie).train()


def test_evaluation_is_a_mean_over_pairs_for_any_batch_size(make: Make, pairs: Dataset) -> None:
    metrics = []
    for size in (7, 2):
        trainer = make(eval_dataset=pairs, per_device_eval_batch_size=size, nll_weight=0.5)
        trainer.train()
        metrics.append(trainer.evaluate())
    assert metrics[1]["eval_pairs"] == 7
    for key in ("eval_loss", "eval_rewards/margins", "eval_nll", "eval_ot/mass"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], abs=1e-5)
    assert metrics[0]["eval_loss"] == pytest.approx(
        metrics[0]["eval_preference_loss"] + 0.5 * metrics[0]["eval_nll"], abs=1e-6
    )


def test_trl_losses_run_by_trls_path(make: Make, dense: PreTrainedModel, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path / "model")  # TRL loads its reference from where the model came from
    model = type(dense).from_pretrained(tmp_path / "model")
    trainer = make(model, loss_type=["ipo"], per_device_train_batch_size=2, num_train_epochs=1)
    trainer.train()
    # IPO at the reference is (0 - 1 / (2 beta))^2 = 25
    assert logged(trainer, "loss")[0] == pytest.approx(25, abs=1e-3)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_aot_over_a_step_sorts_all_of_its_pairs_and_no_filler(make: Make, loss: str, tmp_path: Path) -> None:
    """Seven pairs in one batch, where TRL's own sorts as many, against 2 + 2 + 2 + (1 and a filler)."""
    cut: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = make(loss_type=[loss], loss_scope="global", nll_weight=0.2)
    weights = trained(whole)
    parts = make(loss_type=[loss], loss_scope="global", nll_weight=0.2, output_dir=str(tmp_path / "parts"), **cut)
    torch.testing.assert_close(trained(parts), weights, rtol=0, atol=1e-5)
    for key in ("loss", "preference_loss", "rewards/margins", "kl", "grad_norm"):
        assert logged(parts, key) == pytest.approx(logged(whole, key), abs=1e-5)


def test_trls_aot_over_micro_batches_is_another_loss(make: Make, tmp_path: Path) -> None:
    whole, parts = (
        trained(make(loss_type=["aot"], per_device_train_batch_size=size, gradient_accumulation_steps=14 // size // 2))
        for size in (7, 1)
    )
    assert max((whole[name] - parts[name]).abs().max() for name in whole) > 1e-3


def test_aot_over_a_step_refuses_dropout(make: Make, dense: PreTrainedModel) -> None:
    dense.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"without dropout, but model\.layers\.1\.self_attn\.attention_dropout is 0\.1"):
        make(dense, loss_type=["aot"], loss_scope="global")


def test_a_live_reference_is_the_stored_one(make: Make, ernie: PreTrainedModel, tmp_path: Path) -> None:
    stored = make()
    weights = trained(stored)
    live = make(ref_model=copy.deepcopy(ernie), reference="live", output_dir=str(tmp_path / "live"))
    torch.testing.assert_close(trained(live), weights, rtol=0, atol=1e-5)
    assert logged(live, "kl") == pytest.approx(logged(stored, "kl"), abs=1e-5)
    assert logged(live, "kl")[-1] > 0.01
    assert not list((tmp_path / "live").glob("reference_logps*"))


def test_a_reference_of_another_model_must_be_there_before(make: Make, ernie: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="missing: the reference is another model, which has to be run first"):
        make(reference_hash="other").train()
    with pytest.raises(ValueError, match="a live reference without an adapter to switch off is a copy"):
        make(reference="live")
    with pytest.raises(ValueError, match="a stored reference is computed by `store_references`"):
        make(ref_model=ernie)


def test_both_sides_falling_warns_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A huge likelihood term with the wrong sign pushes both completions down."""
    trainer = make(beta=1e-3, num_train_epochs=2 * ALARM_STEPS, learning_rate=1e-2)
    trainer.args.nll_weight = -1.0
    trainer.train()
    assert (
        max(logged(trainer, "logratio_per_token/chosen")[-1], logged(trainer, "logratio_per_token/rejected")[-1]) < -1
    )
    assert [r.getMessage() for r in caplog.records if "have both been more than 0.1 nats" in r.getMessage()] != []
    assert len([r for r in caplog.records if r.name == "dpo.trainer"]) == 1


def test_lengths_and_ratios_are_logged(make: Make, pairs: Dataset) -> None:
    trainer = make(num_train_epochs=1)
    trainer.train()
    for side in ("chosen", "rejected"):
        assert logged(trainer, f"tokens/{side}") == [pytest.approx(sum(map(len, pairs[f"{side}_ids"])) / 7)]
        assert logged(trainer, f"logratio_per_token/{side}") == [pytest.approx(0, abs=1e-6)]


@pytest.mark.parametrize("loss", ["ot_dpo", "sigmoid"])
def test_router_losses_are_logged_and_fillers_route_nothing(
    loss: str, ernie: PreTrainedModel, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Seven pairs in batches of two: our path ends with a filler, TRL's with one pair. All tokens are counted."""
    args = PreferenceArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type=[loss],
        reference="live" if loss == "sigmoid" else "stored", per_device_train_batch_size=2,
        gradient_accumulation_steps=2, num_train_epochs=1, logging_steps=2, report_to="none", disable_tqdm=True,
        router_aux_loss_coef=0.0, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    tokens = sum(len(p["prompt_ids"]) * 2 + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    counted: list[float] = []

    class Counting(ExpertParallelPreferenceTrainer):
        def _drained(self) -> dict[str, float]:
            counted.append(float(self._router_sums["counts"].sum()))
            return super()._drained()

    reference = {"ref_model": copy.deepcopy(ernie)} if loss == "sigmoid" else {}
    router = RouterConfig(scope="global")
    trainer = Counting(ernie, args, train_dataset=pairs, processing_class=tokenizer, router=router, **reference)
    trainer.train()
    assert logged(trainer, "router/balance_loss")[0] == pytest.approx(1, abs=0.2)
    assert counted == [tokens * 2 * 2]  # two layers, two experts a token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["ot_dop"]}, "unknown loss 'ot_dop'; did you mean 'ot_dpo'"),
        ({"loss_type": ["ot_dpo", "sft"]}, "set nll_weight"),
        ({"ld_alpha": 0.5}, "ld_alpha: has no effect on loss_type 'ot_dpo'"),
        ({"loss_type": ["dpo"], "label_smoothing": 0.1}, "label_smoothing: has no effect"),
        ({"router_aux_loss_coef": 0.01}, "router_aux_loss_coef: has no effect on our losses"),
        ({"loss_scope": "global"}, r"loss_scope: 'global' has no effect on \['ot_dpo'\]"),
        ({"loss_type": ["sigmoid"], "ld_alpha": 0.5}, "ld_alpha: weighs tokens of the reference too"),
        ({"max_length": 10}, "max_length: nothing is cut here"),
        ({"loss_type": ["sigmoid"], "nll_weight": 0.1}, "nll_weight: has no effect on TRL's loss 'sigmoid'"),
    ],
)
def test_settings_without_effect_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        PreferenceArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_rows_that_are_not_tokenized_are_refused(
    make: Make, ernie: PreTrainedModel, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"pass it through dpo\.data\.tokenize_pairs"):
        PreferenceTrainer(ernie, make().args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
