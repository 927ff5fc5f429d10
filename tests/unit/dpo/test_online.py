"""What online training refuses and reports; the rounds themselves are in tests/jobs/test_online.py."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from alignment.errors import UserError
from alignment.fingerprint import weights_hash
from alignment.rows import Row, write_rows
from dpo.config import OnlineConfig
from dpo.drawing import Seen
from dpo.online import _change, _check_baseline, _check_disjoint, _link, _pass_rates, plan, run
from dpo.policies import Policies
from dpo.rounds import check_origin, seen_in, training_settings

ROOT = Path(__file__).parents[3]
PROMPTS: list[Row] = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(10)]


SERVED = {"endpoints": ["http://localhost:1"]}


def change(before: Path, after: Path) -> dict[str, float]:
    return _change(_pass_rates(before), before, after)


def config(tmp_path: Path, **settings: Any) -> OnlineConfig:
    return OnlineConfig.model_validate(
        {
            "output_dir": tmp_path,
            "model": "m",
            "prompts": "train.jsonl",
            "evaluation": {"prompts": "held_out.jsonl"},
            "round": {"prompts": 1},
            "training": {"learning_rate": 1e-3},
            **settings,
        }
    )


def test_a_held_out_prompt_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    held_out = [{"id": f"h{i}", "prompt": [{"role": "user", "content": f"{i}??"}]} for i in range(3)]
    _check_disjoint(PROMPTS, held_out, config(tmp_path))
    leaked = {"id": "h9", "prompt": PROMPTS[4]["prompt"]}  # another name, the same text
    with pytest.raises(UserError, match=r"held_out.jsonl: 1 prompts are also in train.jsonl, such as 'h9'"):
        _check_disjoint(PROMPTS, [*held_out, leaked], config(tmp_path))


def evaluation(folder: Path, rates: dict[str, int]) -> Path:
    rows = [{"id": name, "n": 4, "correct": correct, "verdicts": {}} for name, correct in rates.items()]
    write_rows(folder / "by_prompt.jsonl", rows)
    return folder


def test_change_is_paired_by_prompt_whatever_the_order(tmp_path: Path) -> None:
    """Every prompt gains a quarter, so the interval has no width; paired by place it would have."""
    before = evaluation(tmp_path / "before", {"a": 0, "b": 3, "c": 1})
    after = evaluation(tmp_path / "after", {"c": 2, "a": 1, "b": 4})
    assert change(before, after) == pytest.approx({"change": 0.25, "change.low": 0.25, "change.high": 0.25})
    swapped = change(after, before)
    assert swapped["change"] == pytest.approx(-0.25)


def test_evaluations_of_other_prompts_cannot_be_paired(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "before", {"a": 0, "b": 3})
    after = evaluation(tmp_path / "after", {"a": 0, "c": 3})
    with pytest.raises(UserError, match="evaluated other prompts than"):
        change(before, after)


def test_a_baseline_of_other_prompts_is_refused_before_anything_runs(tmp_path: Path) -> None:
    baseline = evaluation(tmp_path / "baseline", {"a": 0, "b": 3})
    of = {"prompts": "held_out.jsonl", "baseline": str(baseline)}
    _check_baseline([{"id": "b"}, {"id": "a"}], config(tmp_path, evaluation=of))
    with pytest.raises(
        UserError, match="baseline: evaluated other prompts than held_out.jsonl: only one of them has 'a'"
    ):
        _check_baseline([{"id": "b"}, {"id": "c"}], config(tmp_path, evaluation=of))
    with pytest.raises(UserError, match=r"not an alignment.evaluate run: it has no by_prompt.jsonl"):
        _check_baseline([], config(tmp_path, evaluation=of | {"baseline": str(tmp_path)}))


def test_verdicts_that_say_nothing_and_prompts_without_an_answer_are_not_counted(tmp_path: Path) -> None:
    verdicts = {
        "both": {"correct": 3, "wrong": 2, "no_answer": 1, "timeout": 2},
        "general": {"None": 8},
        "never": {"wrong": 8},
    }
    write_rows(tmp_path / "by_prompt.jsonl", [{"id": name, "verdicts": found} for name, found in verdicts.items()])
    assert seen_in(tmp_path) == {"both": Seen(3, 6), "never": Seen(0, 8)}


def test_pairs_of_other_weights_are_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    row = {side: [{"role": "user", "content": side}] for side in ("prompt", "chosen", "rejected")}
    pairs = tmp_path / "pairs.jsonl"
    write_rows(pairs, [row | {"id": "a", "weights": weights_hash(tiny_model_folder)}])
    check_origin(pairs, tiny_model_folder)
    write_rows(
        pairs, [row | {"id": "a", "weights": weights_hash(tiny_model_folder)}, row | {"id": "b", "weights": "old"}]
    )
    with pytest.raises(UserError, match="row b was sampled by weights old, not by those of"):
        check_origin(pairs, tiny_model_folder)
    write_rows(pairs, [row | {"id": "c"}])
    with pytest.raises(UserError, match="row c was sampled by weights None"):
        check_origin(pairs, tiny_model_folder)


def test_the_link_to_the_model_moves_with_the_run_and_is_replaced(tmp_path: Path) -> None:
    for name in ("round_1", "round_2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "name").write_text(name)
        _link(tmp_path / "run" / "model", tmp_path / "run" / name)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "model" / "name").read_text() == "round_2"
    assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == ["model", "round_1", "round_2"]


class Fake:
    """An engine that says its weights are those that it was asked for."""

    def __init__(self, model: Path) -> None:
        self.weights, self.closed = weights_hash(model), False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("cuda", "engine", "closed"), [(True, {}, True), (False, {}, False), (True, SERVED, False)])
def test_an_engine_on_the_training_s_gpu_is_closed_before_it(
    cuda: bool,
    engine: dict[str, Any],
    closed: bool,
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr(Policies, "_open", lambda _, model: Fake(model))
    monkeypatch.setattr(Policies, "_check", lambda *_: None)
    monkeypatch.setattr(Policies, "_answers", lambda *_: [])
    policies = Policies(config(tmp_path, engine=engine))
    first = policies.engine_with(tiny_model_folder, PROMPTS)
    policies.release()
    assert first.closed == closed
    again = policies.engine_with(tiny_model_folder, PROMPTS)
    assert (again is not first) == closed and not again.closed


def test_the_gate_has_its_limit_from_the_dtype_or_the_config(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo.policies.open_engine", lambda model, *_: Fake(model))
    monkeypatch.setattr(Policies, "_answers", lambda *_: [])
    monkeypatch.setattr("dpo.policies.gap_per_token", lambda *_: 0.01)
    drawn = {"prompts": 1, "logprob_gate": 0.02}
    for passing in ({"dtype": "bfloat16"}, {"round": drawn}):
        Policies(config(tmp_path, **passing)).engine_with(tiny_model_folder, PROMPTS)
    for failing in ({}, {"dtype": "bfloat16", "round": drawn | {"logprob_gate": 0.005}}):
        with pytest.raises(RuntimeError, match=r"log-probabilities by 0.01 a token.*does not serve these weights"):
            Policies(config(tmp_path, **failing)).engine_with(tiny_model_folder, PROMPTS)


@pytest.mark.parametrize(
    ("gap", "former", "refused"),
    [(0.015, 0.001, True), (0.001, 0.06, False), (0.001, 0.0009, False), (0.001, 0.0004, True)],
)
def test_an_engine_whose_answers_fit_the_former_weights_is_refused_within_the_limit(
    gap: float, former: float, refused: bool, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the limit is 0.02; weights of an earlier round may differ by less."""
    new = tmp_path / "new"
    gaps = {tiny_model_folder: former, new: gap}
    monkeypatch.setattr("dpo.policies.gap_per_token", lambda _, folder, __: gaps[folder])
    policies = Policies(config(tmp_path, dtype="bfloat16"))
    if not refused:
        policies._check(new, tiny_model_folder, [])
        return
    with pytest.raises(RuntimeError, match="does not serve these weights, but the former ones"):
        policies._check(new, tiny_model_folder, [])


def test_a_round_s_training_takes_the_online_settings(tmp_path: Path) -> None:
    settings = training_settings(config(tmp_path, batch_size=3, dtype="bfloat16"), tmp_path / "p", tmp_path / "r", 7)
    assert (settings.seed, settings.batch_size, settings.max_length) == (7, 3, 1024)
    assert (settings.model.path, settings.model.dtype) == (str(tmp_path / "p"), "bfloat16")
    assert (settings.output_dir, settings.rows) == (tmp_path / "r" / "train", str(tmp_path / "r" / "pairs.jsonl"))


@pytest.fixture
def planned(tmp_path: Path, tiny_model_folder: Path) -> OnlineConfig:
    held_out = [{"id": f"h{i}", "prompt": [{"role": "user", "content": f"{i}??"}], "answer": "1"} for i in range(3)]
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    write_rows(tmp_path / "held_out.jsonl", held_out)
    return config(
        tmp_path,
        model=str(tiny_model_folder),
        prompts=str(tmp_path / "prompts.jsonl"),
        evaluation={"prompts": str(tmp_path / "held_out.jsonl")},
        round={"prompts": 9},
        pairing={"per_prompt": 2},
        batch_size=3,
        accelerate=ROOT / "configs" / "accelerate" / "cpu-ep2.yaml",
        training={"learning_rate": 1e-3, "accumulation": 2, "epochs": 2},
    )


def test_a_plan_is_of_the_training_s_ranks_and_leaves_this_process_as_it_was(
    planned: OnlineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 18 pairs, 12 a step: two steps an epoch."""
    monkeypatch.chdir(ROOT)  # the launcher's config names DeepSpeed's from there
    before = dict(os.environ)
    lines = "\n".join(plan(planned))
    assert dict(os.environ) == before
    assert "prompts: 10 to draw from, pass_rate; paired by the math rule, at random" in lines
    assert "step: 2 ranks x 2 x 3 = 12 pairs, at most 4 steps a round" in lines
    assert "memory of one rank: 2 ranks, expert parallelism 2, ZeRO 1, float32" in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": {"prompts": 11}}, "round.prompts: 11 wanted, but there are 10"),
        ({"loss": {"type": "ot_dop"}}, "unknown loss 'ot_dop'; did you mean 'ot_dpo'"),
        ({"accelerate": "cpu-ep3.yaml"}, "accelerate: cpu-ep3.yaml: no such launcher config"),
        ({"sampling": {"max_tokens": 1024}}, "leaves no room for a prompt"),
        ({"evaluation": {"prompts": "prompts"}}, "prompts: no such file"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    planned: OnlineConfig, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        plan(OnlineConfig.model_validate(planned.model_dump() | change))


def test_an_adapter_that_is_not_merged_cannot_be_sampled_from(planned: OnlineConfig) -> None:
    with pytest.raises(ValidationError, match="lora.merge: the engine samples from the merged model"):
        OnlineConfig.model_validate(planned.model_dump() | {"lora": {"merge": False}})


def test_adapters_beside_a_policy_that_changes_are_refused(planned: OnlineConfig) -> None:
    with pytest.raises(ValidationError, match="engine.adapters: a policy whose weights change has none"):
        OnlineConfig.model_validate(planned.model_dump() | {"engine": {"adapters": {"th": "adapter"}}})


@pytest.mark.parametrize(
    ("stop", "rounds", "ending"),
    [
        ({}, [(0.5, 1.0), (0.4, 2.0), None], {"rounds": 2, "stopped_by": "no pairs", "model.round": 2}),
        ({}, [(0.5, 1.0), (0.4, 2.0), (0.3, 9.0)], {"rounds": 3, "stopped_by": "rounds", "model.round": 3}),
        ({"kl": 3.0}, [(0.5, 1.0), (0.6, 3.5)], {"rounds": 2, "stopped_by": "kl", "model.round": 1}),
        ({"patience": 1}, [(0.5, 1.0), (0.5, 1.5)], {"rounds": 2, "stopped_by": "patience", "model.round": 1}),
    ],
)
def test_rounds_follow_each_other_until_something_ends_them(
    stop: dict[str, Any],
    rounds: list[tuple[float, float] | None],
    ending: dict[str, Any],
    planned: OnlineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    baseline = evaluation(tmp_path / "baseline", {"h0": 1, "h1": 1, "h2": 1})  # a quarter
    settings = planned.model_dump() | {"output_dir": tmp_path / "run", "rounds": 3, "stop": stop}
    settings["evaluation"]["baseline"] = str(baseline)
    policies: list[str] = []

    def run_round(_: Policies, __: OnlineConfig, policy: Path, drawn: Any, ___: Any, folder: Path, ____: int) -> Any:
        policies.append(str(policy))
        (folder / "train" / "model").mkdir(parents=True)
        write_rows(folder / "by_prompt.jsonl", [{"id": row["id"], "verdicts": {"correct": 1}} for row in drawn])
        evaluation(folder / "evaluation", {"h0": 2, "h1": 2, "h2": 2})
        found = rounds[len(policies) - 1]
        return found and {"pass_at_1": found[0], "kl": found[1]}

    monkeypatch.setattr("dpo.online.run_round", run_round)
    run(OnlineConfig.model_validate(settings))
    out = tmp_path / "run"
    metrics = json.loads((out / "metrics.json").read_text())
    assert {key: metrics[key] for key in ending} == ending
    expected = [planned.model, *(str(out / f"round_{number}" / "train" / "model") for number in (1, 2))]
    assert policies == expected[: len(rounds)], "each goes on from the one before"
    assert (out / "model").resolve() == (out / f"round_{ending['model.round']}" / "train" / "model").resolve()
    assert metrics["round_1.change"] == pytest.approx(0.25)
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, ending["rounds"] + 1))


def test_a_first_round_without_a_pair_is_a_mistake(planned: OnlineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.online.run_round", lambda *_: None)
    monkeypatch.setattr("dpo.online._baseline", lambda *_: planned.output_dir)
    monkeypatch.setattr("dpo.online._pass_rates", lambda *_: {"h0": 0.5})
    with pytest.raises(UserError, match=r"round_1: no prompt gave a pair; rejects.jsonl says why"):
        run(OnlineConfig.model_validate(planned.model_dump() | {"output_dir": planned.output_dir / "run"}))
