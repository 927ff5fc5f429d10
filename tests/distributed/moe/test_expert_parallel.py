"""Two gloo ranks with DeepSpeed AutoEP under a real Trainer, against one process. Each run is a subprocess."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Launch = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 6


def trained(launch: Launch, folder: Path, *arguments: object, ranks: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    launch("worker.py", folder, "--steps", STEPS, *arguments, ranks=ranks)
    return folder


def record(folder: Path, rank: int = 0) -> dict[str, Any]:
    return dict(torch.load(folder / f"rank{rank}.pt"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def single(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 8 rows a step."""
    return trained(launch, tmp_path_factory.mktemp("single"), "--batch", 8, ranks=1)


@pytest.fixture(scope="module")
def parallel(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks of 2 rows, accumulated twice: the same 8 rows a step."""
    return trained(launch, tmp_path_factory.mktemp("parallel"), "--batch", 2, "--accumulate", 2, "--save-steps", 3)


def test_two_ranks_train_as_one_process_does(single: Path, parallel: Path) -> None:
    """Losses, gradient norms (clipped) and weights agree though the ranks' token counts differ: the mean is global."""
    one, two = record(single), record(parallel)
    assert two["trained_tokens"] != record(parallel, rank=1)["trained_tokens"]
    assert len(one["losses"]) == STEPS
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], abs=1e-5)
    assert min(one["grad_norms"]) > 0.1, "clipping at 0.1 must have been at work"
    torch.testing.assert_close(weights(parallel), weights(single), rtol=0, atol=1e-5)


def test_exported_folder_is_the_model_in_the_engine(parallel: Path) -> None:
    engine = record(parallel)
    model = AutoModelForCausalLM.from_pretrained(parallel / "model").eval()
    with torch.no_grad():
        outputs = model(
            input_ids=engine["probe"]["input_ids"],
            attention_mask=engine["probe"]["attention_mask"],
            output_hidden_states=True,
            output_router_logits=True,
        )
    torch.testing.assert_close(outputs.logits, engine["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(record(parallel, rank=1)["logits"], engine["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.hidden_states[-1], engine["hidden"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.router_logits, engine["router_logits"], rtol=0, atol=1e-5)


def test_every_expert_in_the_exported_folder_was_trained(parallel: Path) -> None:
    initial, final = record(parallel)["initial"], AutoModelForCausalLM.from_pretrained(parallel / "model").state_dict()
    names = [name for name in final if ".experts." in name]
    assert len(names) == 4  # gate_up_proj and down_proj of two layers
    for name in names:
        change = (final[name] - initial[name]).abs().amax(dim=(1, 2))
        assert change.shape == (4,)
        assert change.min() > 1e-4, f"{name}: {change}"


def test_checkpoints_hold_whole_models(parallel: Path) -> None:
    """Not DeepSpeed's half: transformers would load that without a word and draw the missing experts anew."""
    last = load_file(parallel / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors")
    torch.testing.assert_close(last, weights(parallel), rtol=0, atol=0)


def test_killed_run_resumes_to_the_same_bits(launch: Launch, parallel: Path, tmp_path: Path) -> None:
    arguments = ("--batch", 2, "--accumulate", 2, "--save-steps", 3)
    launch("worker.py", tmp_path, "--steps", STEPS, *arguments, "--kill-at", 4, fails=True)
    assert not (tmp_path / "model").exists()
    resumed = trained(launch, tmp_path, *arguments, "--resume")
    assert record(resumed)["losses"] == record(parallel)["losses"]
    torch.testing.assert_close(weights(resumed), weights(parallel), rtol=0, atol=0)


def test_a_launch_that_lost_deepspeed_is_refused(launch: Launch, tmp_path: Path) -> None:
    """accelerate drops DeepSpeed without a word under this variable, and would train plain DDP."""
    finished = launch("worker.py", tmp_path, fails=True, ACCELERATE_USE_CPU="true")
    assert "UserError: expert parallelism was asked for, but accelerate has dropped DeepSpeed" in finished.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_every_model_family_trains_and_exports(launch: Launch, tmp_path: Path) -> None:
    """Logits before and after AutoEP, and of the engine and its reload, for each preset; Ernie also in bfloat16."""
    launch("families.py", tmp_path)
    for rank in range(2):
        for family, result in json.loads((tmp_path / f"families{rank}.json").read_text()).items():
            tolerance = 0.05 if family.endswith("bf16") else 1e-5
            assert result["before"] < tolerance, f"rank {rank}, {family}: {result}"
            assert result["after"] < tolerance, f"rank {rank}, {family}: {result}"
            assert result["moved"] > 0.5, f"rank {rank}, {family} was not trained: {result}"
            assert result["fp32_gates"], f"rank {rank}, {family}: {result}"


# many layouts in one launch


@pytest.fixture(scope="module")
def on_two(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines and trainers of many layouts on two ranks."""
    return many(
        launch, tmp_path_factory.mktemp("many"), "layouts", "gates", "resume", "change", "refused", "saves", ranks=2
    )


@pytest.fixture(scope="module")
def on_four(launch: Launch, on_two: Path) -> Path:
    """The same on four ranks; the trainers go on from what the two saved."""
    return many(launch, on_two, "layouts", "grow", ranks=4)


def many(launch: Launch, folder: Path, *cases: str, ranks: int) -> Path:
    launch("trainers.py", folder, *cases, ranks=ranks)
    return folder


def found(folder: Path, case: str, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((folder / f"{case}{rank}.json").read_text()))


def check_layouts(results: dict[str, dict[str, float]], names: set[str]) -> None:
    """float32 within 1e-5 of one process; bfloat16 nearer to one bfloat16 process than that is to float32."""
    gap = results.pop("bfloat16 reference")
    assert set(results) == names
    for name, result in results.items():
        if "float32" in name:
            for what in ("losses", "gradients", "norms", "weights"):
                assert result[what] < 1e-5, f"{what} of {name}: {result}"
            continue
        assert gap["first_gradients"] > 0.05 and gap["first_norm"] > 0.01 and gap["drift"] > 0.15, gap
        assert result["first_gradients"] < 0.02, f"{name}: {result}"
        assert result["first_norm"] < 1e-3, f"{name}: {result}"
        assert result["losses"] < 0.02 and result["drift"] < 0.12, f"{name}: {result}"


def test_layouts_of_two_ranks_train_as_one_process_does(on_two: Path) -> None:
    """Loss, every gradient, its norm and every parameter over 5 AdamW steps of two clipped, accumulated batches."""
    fp32 = {f"ep{ep}-zero{zero}-float32" for ep in (1, 2) for zero in range(4)}
    bf16 = {f"ep2-zero{zero}-bfloat16" for zero in (1, 2, 3)}
    check_layouts(found(on_two, "layouts-of-2-"), fp32 | bf16 | {"ep2-zero1-float32-checkpointing"})


def test_layouts_of_four_ranks_train_as_one_process_does(on_four: Path) -> None:
    """Expert-parallel size 4, and 2 with every expert held twice."""
    fp32 = {f"ep{ep}-zero{zero}-float32" for ep in (2, 4) for zero in range(4)}
    check_layouts(found(on_four, "layouts-of-4-"), fp32 | {"ep2-zero1-bfloat16", "ep4-zero3-float32-checkpointing"})


def test_routers_of_every_family_compute_in_float32_in_bfloat16_models(on_two: Path) -> None:
    errors = found(on_two, "gates")
    assert {"ernie", "qwen2", "qwen3", "mixtral", "deepseek_v2", "deepseek_v3"} <= errors.keys()
    assert max(errors.values()) < 1e-6, errors


def check_went_on(folder: Path, run: str, result: dict[str, Any], zero: int, forwards: int) -> None:
    """The run ends as the one left alone does, having gone through `forwards` micro-batches of its own."""
    alone = found(folder, "resume")[f"zero{zero}"]
    assert result["forwards"] == forwards
    assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert result["norms"] == pytest.approx(alone["norms"], abs=1e-5)
    expected = weights(folder / "resume" / f"zero{zero}")
    torch.testing.assert_close(weights(folder / run), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zero", range(4))
def test_resumed_run_ends_with_the_same_bits_at_every_zero_stage(on_two: Path, zero: int) -> None:
    alone, again = (found(on_two, "resume")[name] for name in (f"zero{zero}", f"zero{zero} again"))
    assert (alone["forwards"], again["forwards"]) == (12, 8)
    assert len(alone["losses"]) == len(alone["norms"]) == 6
    assert again["losses"] == alone["losses"]
    assert again["norms"] == alone["norms"]
    expected = weights(on_two / "resume" / f"zero{zero}")
    torch.testing.assert_close(weights(on_two / "resume" / f"zero{zero}-again" / "run"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("zero", [1, 3])
def test_run_saved_at_size_2_goes_on_at_size_1(on_two: Path, zero: int) -> None:
    check_went_on(on_two, f"change/zero{zero}/run", found(on_two, "change")[f"zero{zero}"], zero, forwards=8)


@pytest.mark.parametrize(
    ("run", "zero", "forwards"),
    [("zero1-ep4", 1, 4), ("zero1-ep4 again", 1, 2), ("zero2-ep2", 2, 4), ("zero3-ep4", 3, 4)],
)
def test_run_saved_on_two_ranks_goes_on_on_four(on_four: Path, run: str, zero: int, forwards: int) -> None:
    """Half as many micro-batches each; `again` resumes once more from what the four ranks saved."""
    check_went_on(on_four, f"grow/{run.replace(' ', '-')}/run", found(on_four, "grow")[run], zero, forwards)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("endless", "needs a dataset with a length"),
        ("unequal", "unequal numbers of forwards and hang: batches of each rank [2, 4]"),
        ("unequal evaluation", "unequal numbers of forwards and hang"),
        ("rows", "a step was 8 rows (on 2 ranks, expert-parallel size 2, ZeRO 1), is 4"),
        ("stage", "resume with the same ZeRO stage"),
        ("zero0", "DeepSpeed cannot convert what ZeRO 0 saves"),
    ],
)
def test_refused_on_every_rank_before_the_first_step(on_two: Path, case: str, reason: str) -> None:
    for rank in range(2):
        assert reason in found(on_two, "refused", rank)[case]


def test_saves_that_would_write_half_are_shut(on_two: Path) -> None:
    for rank in range(2):
        for way, message in found(on_two, "saves", rank)["shut"].items():
            assert "call trainer.save_model(folder) on every rank" in message, way
    assert not (on_two / "saves" / "half").exists()


@pytest.mark.parametrize("zero", [1, 3])
def test_best_model_is_loaded_whole_at_the_end(on_two: Path, zero: int) -> None:
    """The evaluation loss is made a score to maximise, so that the best is not the last."""
    assert found(on_two, "saves")[f"best{zero}"] == 2
    run = on_two / "saves" / f"best{zero}"
    best = load_file(run / "checkpoints" / "checkpoint-2" / "model.safetensors")
    torch.testing.assert_close(weights(run), best, rtol=0, atol=0)


def test_checkpoints_of_the_model_only_are_whole_models(on_two: Path) -> None:
    run = on_two / "saves" / "only"
    torch.testing.assert_close(weights(run), weights(on_two / "resume" / "zero1"), rtol=0, atol=0)
    last = load_file(run / "checkpoints" / "checkpoint-6" / "model.safetensors")
    torch.testing.assert_close(last, weights(run), rtol=0, atol=0)
