"""Scores of many answers in one pass are those of each alone, in the order asked."""

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from alignment.errors import UserError
from alignment.rows import read_rows, write_rows
from reward.config import ScoreConfig
from reward.model import load_trained_reward_model
from reward.score import Scorer, plan_batches, run, score_rows

USER = {"role": "user", "content": "3 shirts?"}


def questions() -> tuple[list[list[int]], list[list[int]]]:
    """Five prompts with 1 to 9 answers each of 1 to 40 tokens, shuffled; one answer is empty."""
    rng = random.Random(0)
    pairs = []
    for answers in (1, 9, 4, 1, 2):
        prompt = [rng.randrange(5, 300) for _ in range(rng.randrange(1, 30))]
        pairs += [(prompt, [rng.randrange(5, 300) for _ in range(rng.randrange(1, 40))]) for _ in range(answers)]
    pairs.append((pairs[3][0], []))
    rng.shuffle(pairs)
    return [p for p, _ in pairs], [c for _, c in pairs]


@pytest.mark.parametrize("batch_tokens", [16, 100, 8192])
def test_scores_are_those_of_each_answer_alone(reward_folder: Path, batch_tokens: int) -> None:
    prompts, answers = questions()
    plain = load_trained_reward_model(reward_folder)
    with torch.inference_mode():
        alone = [plain(input_ids=torch.tensor([p + c])).logits.item() for p, c in zip(prompts, answers, strict=True)]
    scores = Scorer(reward_folder, batch_tokens).score(prompts, answers)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(alone), atol=1e-5, rtol=0)


def test_equal_answers_to_a_prompt_are_scored_once(reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, answers = questions()
    scorer = Scorer(reward_folder, 100)
    once = scorer.score(prompts, answers)
    passed: list[int] = []
    forward = scorer._forward
    monkeypatch.setattr(scorer, "_forward", lambda inputs: passed.append(len(inputs["last_tokens"])) or forward(inputs))
    again = scorer.score([*prompts, *prompts[::-1]], [*answers, *answers[::-1]])
    assert again == once + once[::-1]
    assert sum(passed) == len(prompts)


def test_batches_keep_to_the_budget_and_hold_every_answer_once() -> None:
    prompts, answers = questions()
    batches = plan_batches(prompts, answers, batch_tokens=100, context=128)
    assert sorted(i for _, members in batches for i in members) == list(range(len(prompts)))
    for groups, members in batches:
        assert sum(group.tokens for group in groups) <= 100
        held = [group.prompt + answer for group in groups for answer in group.answers]
        assert held == [prompts[i] + answers[i] for i in members]
    tokens = sum(group.tokens for groups, _ in batches for group in groups)
    assert tokens < 0.85 * sum(len(p) + len(c) for p, c in zip(prompts, answers, strict=True))


def test_an_answer_beyond_the_context_is_refused(reward_folder: Path) -> None:
    with pytest.raises(UserError, match="129 tokens.*1 to 128"):
        Scorer(reward_folder, 100).score([[5], [5]], [[6], [6] * 128])


def test_attention_that_is_not_plain_is_refused(reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(module: object, query: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setattr("reward.shared_prompt.shared_prompt_attention", blind)
    with pytest.raises(UserError, match="scored together differ"):
        Scorer(reward_folder, 100)


def test_the_job_scores_rows_and_resumes_by_chunk(
    reward_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": f"p{i}", "prompt": [USER], "completions": ["37.5", f"{i}"]} for i in range(5)]
    rows.append({"id": "single", "prompt": [USER], "completion": "12"})
    write_rows(tmp_path / "rows.jsonl", rows)
    config = ScoreConfig(
        output_dir=tmp_path / "out", model=str(reward_folder), rows=str(tmp_path / "rows.jsonl"), chunk_rows=2
    )
    calls = []

    def scored(*args: object) -> list[dict[str, object]]:
        calls.append(args)
        if len(calls) == 3:
            raise InterruptedError
        return score_rows(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("reward.score.score_rows", scored)
    with pytest.raises(InterruptedError):
        run(config)
    run(config)
    assert len(calls) == 4  # two chunks, the interrupted one, and that one again
    found = list(read_rows(tmp_path / "out" / "rows.jsonl"))
    expected = score_rows(rows, Scorer(reward_folder, 8192), tiny_tokenizer)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    for row, other in zip(found, expected, strict=True):
        ours, theirs = (r.get("scores") or [r["score"]] for r in (row, other))
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert found[0]["scores"][0] == pytest.approx(found[4]["scores"][0], abs=1e-5)  # the same text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a"], "completion": "a"}, "expected one of"),
        ({"completoin": "a"}, "did you mean 'completoin'"),
        ({"completions": []}, "must be a list of texts"),
        ({"completion": 3}, "must be a text"),
    ],
)
def test_rows_without_answers_are_refused(
    row: dict[str, object], message: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=f"row 0: .*{message}"):
        score_rows([{"prompt": [USER]} | row], None, tiny_tokenizer)  # type: ignore[arg-type]
