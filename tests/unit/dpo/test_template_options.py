"""A prompt's tools and switch in reward and preference rows: the tokens that the policy sampled from."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.rollout.sampling import _fitting
from alignment.rows import Row, located_rows, write_rows
from dpo.data import tokenize_pairs
from reward import rendering

ROW: Row = {
    "id": "p",
    "prompt": [{"role": "user", "content": "3 shirts?"}],
    "chosen": [{"role": "assistant", "content": "37.5"}],
    "rejected": [{"role": "assistant", "content": "12.5"}],
}
OPTIONS: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "price"}}],
    "chat_template_kwargs": {"enable_thinking": True},
}


def test_prompts_are_the_same_in_sampling_and_in_training(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [ROW | OPTIONS, ROW, ROW | {"tools": OPTIONS["tools"]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    sampled = [_fitting(tiny_tokenizer, [row], 4096)["p"] for row in rows]
    assert len({tuple(ids) for ids in sampled}) == 3
    text = tiny_tokenizer.decode(sampled[0])
    assert chat.THINKING_PROMPT in text and '{"name": "price"}' in text
    pairs, _ = tokenize_pairs(rows, tiny_tokenizer, max_length=4096)
    assert pairs["prompt_ids"] == sampled
    [batch] = rendering.render(located_rows(tmp_path / "rows.jsonl", "preference"), tiny_tokenizer)
    for ids, prompt in zip(batch["chosen_ids"].to_pylist(), sampled, strict=True):
        assert ids == prompt + chat.render_completion(tiny_tokenizer, "37.5")
