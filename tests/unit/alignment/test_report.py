"""The report of a small made-up run: its numbers, what it escapes, and what it does where stages are missing."""

import io
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from alignment import report
from alignment.errors import UserError
from alignment.report import svg
from alignment.report.tables import compare
from alignment.stats import mean_interval, paired_interval

JOBS = {
    "data": "data_builders.synthesize",
    "sft": "sft.train",
    "sft_long": "sft.train",
    "evaluate": "alignment.evaluate",
    "reward_pairs": "data_builders.preferences",
    "reward_sweep": "reward.sweep",
    "best_of_n": "reward.best_of_n",
    "online": "dpo.online",
}
QUESTIONS = {
    "en": "A shop sells <b>3</b> pens & a pad. What is the total?",
    "zh": "商店所有枕头降价70%。现在买2个要多少钱",
    "th": "ร้านขายข้าว 2 กิโลกรัม ราคา 142 บาท 7 กิโลกรัมราคาเท่าไร",
}
ATTACK = "<script>alert('x')</script> \\boxed{1}"
SECONDS = 12.5
RATES = (0.4, 0.5, 0.6)  # pass rates of the SFT model and of the rounds


def prompts_of(count: int) -> list[dict[str, Any]]:
    languages, templates = list(QUESTIONS), ("change", "stock")
    return [
        {
            "id": f"held/{i}",
            "kind": "math",
            "language": languages[i % 3],
            "template": templates[i % 2],
            "prompt": [{"role": "user", "content": QUESTIONS[languages[i % 3]]}],
            "answer": str(i),
        }
        for i in range(count)
    ]


def write_pipeline(root: Path, jobs: dict[str, str] = JOBS) -> Path:
    """The pipeline's file and a config for each stage; no stage has begun."""
    stages = []
    for name, job in jobs.items():
        config = root / "configs" / f"{name}.yaml"
        write_text(config, f"output_dir: {root / 'runs' / name}\n")
        stages.append({"name": name, "job": job, "config": str(config)})
    path = root / "configs" / "demo.yaml"
    write_text(path, yaml.safe_dump({"output_dir": str(root / "runs"), "stages": stages}))
    return path


def write_run(root: Path, prompts: Sequence[dict[str, Any]] = (), n: int = 8, steps: int = 6) -> Path:
    """A whole run of the demo's stages, as their jobs write it. Returns the pipeline's path."""
    rows = list(prompts) or prompts_of(24)
    path = write_pipeline(root)
    runs = root / "runs"
    rng = np.random.default_rng(0)
    write_text(runs / "data" / "held_out.jsonl", lines(rows))
    finish(runs / "data", JOBS["data"], {"rows.held_out": len(rows)})
    write_sft(runs / "sft", steps, 0.98, packs=30)
    write_sft(runs / "sft_long", steps, 0.9, packs=10, speeds=(90.0, 1200.0, 1300.0, 1250.0, 20.0))
    graded = write_evaluation(runs / "evaluate", rows, n, RATES[0], rng)
    finish(runs / "evaluate", "alignment.evaluate", graded, config={"prompts": str(runs / "data" / "held_out.jsonl")})
    finish(runs / "reward_pairs", JOBS["reward_pairs"], {"pairs": 60, "dropped.none_correct": 12})
    write_ledger(runs / "reward_pairs", 72, {"none correct": 12})
    for i in range(1, 5):
        finish(
            runs / "reward_sweep" / f"rm_{i}",
            "reward.train",
            {"accuracy": 0.7 + i / 100},
            history=[{"step": s, "loss": 0.7 - s / 50 + i / 100} for s in range(steps)],
        )
    finish(runs / "reward_sweep", "reward.sweep", {"rm_1.accuracy": 0.71})
    write_best_of_n(runs / "best_of_n", runs / "evaluate", n, rng)
    write_online(runs / "online", runs / "evaluate", rows, n, steps, rng)
    return path


def write_sft(folder: Path, steps: int, used: float, packs: int, speeds: Sequence[float] = ()) -> None:
    """An SFT run; without `speeds` one of a time when no speed, padding or mixture was written."""
    metrics = {"train.loss": 0.7, "train.steps": steps, "packing.utilisation": used, "packing.packs": packs}
    history = [routed_step(10 * i, 4 * math.exp(-i / 4)) for i in range(1, steps)]
    ledger: dict[str, Any] = {}
    if speeds:
        metrics |= {"packing.padding_share": 0.0123, "packing.imbalance_tokens": 0.0034}
        metrics |= {"packing.imbalance_attention": 0.0056}
        for (line, _), speed in zip(history, speeds, strict=True):
            line |= {"valid_tokens_per_second": speed, "tokens_per_second": speed + 10}
        ledger = {"truncated": 7}
        sources = [
            {"source": name, "rows": rows, "drawn": 50, "epoch_rows": 40, "epoch_tokens": 4321, "token_share": share}
            for name, rows, share in (("general.jsonl", 1000, 0.75), ("<shop>.jsonl", 200, 0.25))
        ]
        write_text(folder / "mixture.json", json.dumps(sources))
    finish(
        folder,
        "sft.train",
        metrics,
        config={"packing": {"capacity": 512}},
        history=[line for step in history for line in step],
    )
    write_ledger(folder, 100, {"overlong": 4}, ledger)


def routed_step(step: int, loss: float) -> list[dict[str, Any]]:
    """The lines that a step of a mixture-of-experts model logs: expert 2 of layer 1 is dead."""
    values = {"router/balance_loss": 1.2, "router/load_max": 1.5, "router/dead_experts": 1}
    load = [[1.5, 0.75, 0.75], [1.8, 1.2, 0.0]]
    return [{"step": step, "loss": loss, "learning_rate": 1e-3, **values}, {"step": step, "expert_load": load}]


def write_evaluation(
    folder: Path, rows: Sequence[dict[str, Any]], n: int, rate: float, rng: np.random.Generator
) -> dict[str, Any]:
    """graded.parquet, by_prompt.jsonl and metrics.json of an evaluation. Returns the metrics."""
    ability = np.clip(rng.normal(rate, 0.25, len(rows)), 0.02, 0.98)
    verdicts = np.where(rng.random((len(rows), n)) < ability[:, None], "correct", "wrong").astype(object)
    verdicts[rng.random(verdicts.shape) < 0.1] = "no_answer"
    table = [
        {"id": row["id"], "index": i, "completion": ATTACK, "token_ids": [1, 2], "finish_reason": "stop",
         "logprob": -3.0, "extracted": row["answer"], "verdict": str(verdicts[p, i])}
        for p, row in enumerate(rows)
        for i in range(n)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "graded.parquet")
    correct = (verdicts == "correct").sum(1)
    by_prompt = [
        {
            "id": row["id"],
            "language": row["language"],
            "template": row["template"],
            "n": n,
            "correct": int(c),
            "tokens": 9,
        }
        for row, c in zip(rows, correct, strict=True)
    ]
    write_text(folder / "by_prompt.jsonl", lines(by_prompt))
    metrics = (
        mean_interval((correct / n).tolist()).as_metrics("pass_at_1")
        | {f"verdict.{name}": int((verdicts == name).sum()) for name in ("correct", "wrong", "no_answer")}
        | {"pass_at_1.prompts": len(rows), "tokens.mean": 9.0, "truncated": 0}
    )
    write_text(folder / "metrics.json", json.dumps(metrics))
    return metrics


def write_best_of_n(folder: Path, evaluation: Path, n: int, rng: np.random.Generator) -> None:
    verdicts = pq.read_table(evaluation / "graded.parquet", columns=["id", "index", "verdict"]).to_pydict()
    good = np.array([verdict == "correct" for verdict in verdicts["verdict"]])
    names = [*(f"rm_{i}" for i in range(1, 5)), "average"]
    folder.mkdir(parents=True)
    scores = {name: 1.5 * good + rng.normal(0, 1, good.size) for name in names}
    pq.write_table(
        pa.table({"id": verdicts["id"], "index": verdicts["index"], **scores, "verdict": verdicts["verdict"]}),
        folder / "scores.parquet",
    )
    curves: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    for i, name in enumerate([*names, "majority", "oracle", "first"]):
        values = [0.4 + 0.3 * (1 - 1 / k) * (1 + i / 20) * (name != "first") for k in range(1, n + 1)]
        curves[name] = {"k": list(range(1, n + 1)), "value": values}
        curves[name] |= {"low": [v - 0.03 for v in values], "high": [v + 0.03 for v in values]}
        if name != "first":
            ends = (values[-1], values[-1] - 0.03, values[-1] + 0.03)
            metrics |= dict(zip([f"best_of_{n}.{name}{end}" for end in ("", ".low", ".high")], ends, strict=True))
    write_text(folder / "curves.json", json.dumps({"curves": curves}))
    gains = {"average.over.rm_1": (0.021, -0.004, 0.046), "rm_2.over.first": (0.1, 0.05, 0.15)}
    for pair, ends in gains.items():
        metrics |= dict(zip([f"gain_{n}.{pair}{end}" for end in ("", ".low", ".high")], ends, strict=True))
    metrics |= {f"weighted_majority_{n}.rm_1{end}": value for end, value in ((".low", 0.4), ("", 0.5), (".high", 0.6))}
    chosen = {"selection.model": "average", "selection.next": "rm_1", "selection.by_pairwise": "rm_3"}
    margin = {"selection.margin": 0.021, "selection.margin.low": -0.004, "selection.margin.high": 0.046}
    finish(folder, "reward.best_of_n", {**metrics, **chosen, **margin})


def write_online(
    folder: Path, start: Path, rows: Sequence[dict[str, Any]], n: int, steps: int, rng: np.random.Generator
) -> None:
    before = pass_rates(start)
    log: list[dict[str, Any]] = []
    for number, rate in enumerate(RATES[1:], start=1):
        part = folder / f"round_{number}"
        history = [
            {"step": s, "loss": 1 - s / 40, "preference_loss": 0.7 - s / 60, "nll": 0.3, "rewards/margins": s / 10,
             "rewards/accuracies": min(1.0, 0.5 + s / 30), "logps_per_token/chosen": -0.4 - s / 200,
             "logps_per_token/rejected": -0.5 - s / 40, "kl": s / 500, "ot/spread": 0.2 + s / 100, "ot/fallbacks": 1,
             "logratio_per_token/chosen": -s / 200, "logratio_per_token/rejected": -s / 40, "tokens/chosen": 20 + s}
            for s in range(1, steps + 1)
        ]  # fmt: skip
        finish(part / "train", "dpo.train", {"train.loss": 0.8, "alarms.both_fall": number - 1}, history=history)
        found = write_evaluation(part / "evaluation", rows, n, rate, rng)
        (part / "evaluation/metrics.json").unlink()  # the job keeps a round's metrics in its own
        write_ledger(part, 40, {"none correct": 3, "all correct": 2})
        change = paired_interval(before, pass_rates(part / "evaluation"))
        log.append({"step": number, **found, **change.as_metrics("change"), "pairs": 35})
    metrics = {f"round_{line['step']}.{key}": value for line in log for key, value in line.items() if key != "step"}
    finish(folder, "dpo.online", metrics, history=log)


def pass_rates(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "by_prompt.jsonl").read_text().splitlines()]
    return [row["correct"] / row["n"] for row in rows]


def finish(
    folder: Path,
    job: str,
    metrics: dict[str, Any],
    config: dict[str, Any] | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> None:
    record = {"job": job, "seconds": SECONDS, "seed": 0, "attempts": 1, "git_commit": "abc123", "python": "3.11.7"}
    write_text(
        folder / "run.json", json.dumps(record | {"world_size": 1, "versions": {"torch": "2.13.0", "peft": None}})
    )
    write_text(folder / "metrics.json", json.dumps(metrics))
    write_text(folder / "resolved_config.yaml", yaml.safe_dump({"output_dir": str(folder)} | (config or {})))
    if history:
        write_text(folder / "metrics.jsonl", lines(history))
    write_text(folder / "DONE", "now\n")


def write_ledger(folder: Path, rows: int, dropped: dict[str, int], more: dict[str, Any] | None = None) -> None:
    ledger = {"rows_in": rows, "rows_out": rows - sum(dropped.values()), "dropped": dropped, "tokens_in": 90 * rows}
    write_text(folder / "ledger.json", json.dumps(ledger | (more or {})))


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class Outline(HTMLParser):
    """Checks that elements nest, and keeps their names, attributes and text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if (self.get_starttag_text() or "").endswith("/>") and self.open[-1:] != [tag]:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("demo"))
    report.build(path)
    return path


@pytest.fixture(scope="module")
def runs(pipeline: Path) -> Path:
    return pipeline.parents[1] / "runs"


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    return (runs / "report.html").read_text(encoding="utf-8")


def test_metrics_are_those_of_the_stages(runs: Path) -> None:
    metrics = json.loads((runs / "metrics.json").read_text())
    for folder, name in (
        ("evaluate", "sft"),
        ("online/round_1/evaluation", "round_1"),
        ("online/round_2/evaluation", "round_2"),
    ):
        mean = mean_interval(pass_rates(runs / folder))
        found = [metrics[f"pass_at_1.{name}{end}"] for end in ("", ".low", ".high")]
        assert found == pytest.approx([mean.value, mean.low, mean.high])
    change = paired_interval(pass_rates(runs / "evaluate"), pass_rates(runs / "online/round_2/evaluation"))
    assert (metrics["change.round_2"], metrics["change.round_2.low"]) == pytest.approx((change.value, change.low))
    best = json.loads((runs / "best_of_n/metrics.json").read_text())
    shown = {key: value for key, value in best.items() if key.startswith("best_of_8.")}
    assert {key: value for key, value in metrics.items() if key.startswith("best_of_8.")} == shown
    assert metrics["pass_at_1.prompts"] == 24
    assert metrics["packing.utilisation"] == pytest.approx((30 * 0.98 + 10 * 0.9) / 40)
    assert metrics["seconds.sft"] == SECONDS
    assert metrics["seconds.total"] == SECONDS * len(JOBS)


def test_summary_states_values_with_intervals(pipeline: Path, runs: Path) -> None:
    metrics = json.loads((runs / "metrics.json").read_text())
    rows = {row.measure: row for row in report.summary_rows(pipeline)}
    low, high = metrics["pass_at_1.round_2.low"], metrics["pass_at_1.round_2.high"]
    assert rows["pass@1 after round 2"].value == f"{metrics['pass_at_1.round_2']:.1%}"
    assert rows["pass@1 after round 2"].interval == f"{100 * low:.1f} to {high:.1%}"
    assert rows["change after round 2"].value == f"+{100 * metrics['change.round_2']:.1f} points"
    assert [name for name in rows if name.startswith("best of 8")] == [
        f"best of 8 by {name}" for name in ("rm_1", "rm_2", "rm_3", "rm_4", "average", "majority", "oracle")
    ]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(report.summary(pipeline))
    printed = console.export_text()
    assert "24 held-out prompts" in printed
    assert all(row.value in printed and row.interval in printed for row in rows.values())


def test_same_files_give_the_same_numbers_and_table(pipeline: Path, runs: Path) -> None:
    before = (runs / "metrics.json").read_bytes(), report.summary_rows(pipeline)
    report.build(pipeline)
    assert ((runs / "metrics.json").read_bytes(), report.summary_rows(pipeline)) == before


def test_page_stands_alone(page: str) -> None:
    outline = Outline(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    fetching = {"src", "srcset", "xlink:href", "data", "action", "poster"}
    assert not [value for name, value in outline.attributes if name in fetching]
    assert all((value or "").startswith("#") for name, value in outline.attributes if name == "href")
    assert not re.search(r"url\(|@import|https?://", page)
    anchors = [value for name, value in outline.attributes if name == "id"]
    assert len(anchors) == len(set(anchors))
    targets = [(value or "")[1:] for name, value in outline.attributes if name == "href"]
    assert targets == anchors


def test_what_models_and_prompts_say_is_escaped(page: str) -> None:
    text = Outline(page).text
    assert ATTACK in text
    assert QUESTIONS["en"] in text
    assert QUESTIONS["th"] in text
    assert "<script" not in page.lower()


def test_every_drawing_is_made_of_finite_numbers(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 20
    assert not [drawing for drawing in drawings if re.search(r"\b(nan|inf)\b", drawing, re.IGNORECASE)]


def test_sections_tell_the_whole_run(page: str, pipeline: Path) -> None:
    text = Outline(page).text
    assert "Two rounds of online preference training raised pass@1 from" in text
    for words in ("By language", "By template", "Samples", "Best of n", "Reward models", "Preference training"):
        assert words in text
    assert "overlong 4" in text
    assert "none correct 3, all correct 2" in text
    assert "12 pairs' transport was not solved by POT, and was in the log domain" in text
    assert (
        "ALARM: chosen and rejected answers have both become less likely than under the reference, in round 2" in text
    )
    assert f"python -m dpo.online --config {pipeline.parent / 'online.yaml'}" in text
    assert "abc123" in text


def test_best_of_n_shows_gains_and_the_choice(page: str) -> None:
    text = Outline(page).text
    assert "The best picks are those of average. Its margin over rm_1 is +2.1 points (95%: \u22120.4 to +4.6)." in text
    assert "Pairwise accuracy would have chosen rm_3." in text
    assert "average over rm_1 +2.1 \u22120.4 to +4.6" in text
    assert "rm_2 over first +10.0 +5.0 to +15.0" in text, "folded"
    assert "50.0% (40.0 to 60.0%)" in text, "the weighted vote"
    assert "rm_1.low" not in text, "the ends of an interval are no model"


def test_packing_shows_speed_waste_and_mixture_where_they_were_written(page: str) -> None:
    text = Outline(page).text
    assert "mean loss sft 98.0% 6 0.7 sft_long 90.0% 1.23% 0.34% 0.56% 1,200 6 0.7" in text, "the median, not the mean"
    assert "sft_long general.jsonl 1,000 50 40 4,321 75.0% sft_long <shop>.jsonl 200 50 40 4,321 25.0%" in text
    assert "overlong 4; 7 rows came out truncated" in text
    panels = re.findall(r"<h4>([^<]*: tokens a second)</h4>", page)
    assert panels == ["sft_long: tokens a second"] * 2, "for a desktop and a phone"


def test_load_of_the_experts_is_that_of_the_last_line(page: str) -> None:
    section = page[page.index("Experts</h2>") :]
    assert "over the last 10 steps: 1 of 6 experts got no token" in section
    assert "layer 1, expert 0: 1.80 of an even share" in section
    assert section.count('class="cell dead"') == 4  # two stages, each drawn for a desktop and a phone


def test_nothing_has_run(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path)
    text = Outline(report.build(pipeline).read_text(encoding="utf-8")).text
    assert "No model has been evaluated yet. 0 of 8 stages have finished." in text
    assert "python -m alignment.evaluate" in text
    assert json.loads((tmp_path / "runs/metrics.json").read_text()) == {}
    assert report.summary_rows(pipeline) == []
    with pytest.raises(UserError, match="finished evaluation"):
        report.picture(pipeline, tmp_path / "picture.png")


@pytest.mark.parametrize("missing", JOBS)
def test_a_stage_that_has_not_begun(tmp_path: Path, missing: str) -> None:
    pipeline = write_run(tmp_path)
    (tmp_path / "runs" / missing).rename(tmp_path / "elsewhere")
    text = Outline(report.build(pipeline).read_text(encoding="utf-8")).text
    metrics = json.loads((tmp_path / "runs/metrics.json").read_text())
    assert "7 of 8 stages have finished" in text
    assert f"{missing} not started {JOBS[missing]}" in text
    assert f"seconds.{missing}" not in metrics
    assert metrics["seconds.total"] == SECONDS * 7


def test_an_unfinished_online_stage_shows_its_finished_round(tmp_path: Path) -> None:
    pipeline = write_run(tmp_path)
    online = tmp_path / "runs/online"
    for name in ("DONE", "metrics.json", "round_2/evaluation/by_prompt.jsonl"):
        (online / name).unlink()
    write_text(online / "run.json", json.dumps({"job": "dpo.online"}))
    write_text(online / "metrics.jsonl", (online / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    log = online / "round_2/train/metrics.jsonl"
    write_text(log, log.read_text() + '{"step": 7, "lo')
    text = Outline(report.build(pipeline).read_text(encoding="utf-8")).text
    metrics = json.loads((tmp_path / "runs/metrics.json").read_text())
    assert "One round of online preference training raised pass@1" in text
    assert "online unfinished dpo.online" in text
    assert "cannot be read" not in text
    assert {"pass_at_1.round_1", "change.round_1"} <= set(metrics)
    assert not {"pass_at_1.round_2", "change.round_2"} & set(metrics)


def test_shares_changes_and_nats_are_written_as_such() -> None:
    ends = [
        (key + end, value + shift)
        for key, value in (("pass_at_1", 0.5), ("change", 0.1), ("kl", 1.73))
        for end, shift in ((".low", -0.05), ("", 0.0), (".high", 0.05))
    ]
    assert [row[1] for row in compare([("run", dict(ends))]).rows] == [
        "50.0% (45.0 to 55.0%)",
        "+10.0 points (+5.0 to +15.0)",
        "1.73 (1.68 to 1.78)",
    ]


def test_groups_of_one_prompt_have_no_interval(tmp_path: Path) -> None:
    pipeline = write_run(tmp_path, prompts_of(3))
    page = report.build(pipeline).read_text(encoding="utf-8")
    assert "By language" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_a_damaged_file_is_named_and_left_out(tmp_path: Path) -> None:
    pipeline = write_run(tmp_path)
    write_text(tmp_path / "runs/best_of_n/curves.json", "{")
    write_text(tmp_path / "runs/evaluate/graded.parquet", "PAR1")
    (tmp_path / "runs/data/held_out.jsonl").unlink()
    text = Outline(report.build(pipeline).read_text(encoding="utf-8")).text
    for name in ("best_of_n/curves.json", "evaluate/graded.parquet"):
        assert f"{tmp_path}/runs/{name} cannot be read and is left out" in text


def test_a_job_that_the_report_does_not_know(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path, {"odd": "some.job"})
    history = [{"step": i, "speed": i * i, "phase": "warm"} for i in range(5)]
    finish(tmp_path / "runs/odd", "some.job", {"answer": 42, "name": "<i>"}, history=history)
    page = report.build(pipeline).read_text(encoding="utf-8")
    text = Outline(page).text
    assert "odd: some.job" in text
    assert "answer 42 name <i>" in text
    assert 'aria-label="speed"' in page


def test_a_folder_of_another_job_is_named(tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path, {"odd": "some.job"})
    finish(tmp_path / "runs/odd", "other.job", {})
    assert "expected a run of some.job, found one of other.job" in report.build(pipeline).read_text(encoding="utf-8")


def test_picture(pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    report.picture(pipeline, file)
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1600, 700)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.41, 0.62), ["40%", "45%", "50%", "55%", "60%", "65%"]),
        ((0.0, 1.0), ["0%", "20%", "40%", "60%", "80%", "100%"]),
        ((0.5, 0.5), ["20%", "30%", "40%", "50%", "60%", "70%", "80%"]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values: tuple[float, float], ticks: list[str]) -> None:
    axis = svg.linear(values, percent=True)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert [axis.format(tick) for tick in axis.ticks] == ticks


def test_labels_are_moved_apart_and_no_further() -> None:
    assert svg.apart([50, 10, 100], 15, 0, 200) == [50, 10, 100]
    assert svg.apart([100, 100], 10, 0, 200) == [95, 105]
    assert svg.apart([198, 199, 30], 10, 0, 200) == [190, 200, 30]
    placed = sorted(svg.apart([10, 11, 12, 24], 10, 0, 200))
    assert [round(b - a, 6) for a, b in pairwise(placed)] == [10, 10, 10]
