"""Tokenized pairs, fillers, order and the collator."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from alignment import chat
from alignment.errors import UserError
from dpo.data import PairCollator, ShuffledFillersLast, fill, filler_pair, tokenize_pairs


def test_pairs_are_what_an_engine_would_see(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> None:
    pairs, ledger = tokenize_pairs(rows, tokenizer, max_length=100)
    assert len(pairs) == 7
    assert tokenizer.decode(pairs[1]["chosen_ids"]).split() == ["is", "four", "<|im_end|>"]
    assert pairs[1]["chosen_ids"][-1] == tokenizer.eos_token_id
    rendered = tokenizer.apply_chat_template(rows[1]["prompt"], add_generation_prompt=True)["input_ids"]
    assert pairs[1]["prompt_ids"] == rendered
    assert pairs["row"] == list(range(7))
    assert ledger.tokens_in == ledger.tokens_trained == sum(map(len, [*pairs["chosen_ids"], *pairs["rejected_ids"]]))


def test_overlong_pairs_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> None:
    everything, _ = tokenize_pairs(rows, tokenizer, max_length=100)
    widths = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in everything.to_list()]
    pairs, ledger = tokenize_pairs(rows, tokenizer, max_length=max(widths) - 1)
    kept = [i for i, width in enumerate(widths) if width < max(widths)]
    assert pairs["chosen_ids"] == [everything["chosen_ids"][i] for i in kept]
    assert pairs["row"] == list(range(len(kept)))
    assert ledger.dropped["too_long"] == 7 - len(kept) > 0
    assert ledger.tokens_in == ledger.tokens_trained + ledger.tokens_dropped
    ledger.check()
    with pytest.raises(UserError, match=r"no preference pair left of 7 rows; dropped: .'too_long': 7"):
        tokenize_pairs(rows, tokenizer, max_length=3)


def test_a_completion_of_several_turns_is_refused(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    bad = rows[0] | {"chosen": rows[0]["prompt"] + rows[0]["chosen"]}
    with pytest.raises(UserError, match=r"row row-0: 'chosen' must be one assistant message.*'user', 'assistant'"):
        tokenize_pairs([bad], tokenizer, max_length=100)


def sampled(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text in single letters: ids that its tokenization would not give."""
    letters = [i for letter in text for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    return [*letters, tokenizer.eos_token_id]


@pytest.fixture
def sampled_row(tiny_tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    texts = ("A shirt costs 12.5", "the answer is 45")
    return {
        "id": "s",
        "prompt": [{"role": "user", "content": "3 shirts?"}],
        **{side: [{"role": "assistant", "content": t}] for side, t in zip(("chosen", "rejected"), texts, strict=True)},
        "token_ids": [sampled(tiny_tokenizer, t) for t in texts],
        "tokenizer": chat.tokenizer_hash(tiny_tokenizer),
    }


def test_sampled_ids_are_trained_on_as_they_are(
    tiny_tokenizer: PreTrainedTokenizerBase, sampled_row: dict[str, Any]
) -> None:
    pairs, ledger = tokenize_pairs([sampled_row], tiny_tokenizer, max_length=200)
    from_text, _ = tokenize_pairs([sampled_row | {"token_ids": None}], tiny_tokenizer, max_length=200)
    assert [pairs[0]["chosen_ids"], pairs[0]["rejected_ids"]] == sampled_row["token_ids"]
    assert len(from_text[0]["chosen_ids"]) < len(pairs[0]["chosen_ids"]), "the text would give other tokens"
    assert from_text[0]["prompt_ids"] == pairs[0]["prompt_ids"]
    assert ledger.retokenized == 0


def test_ids_of_another_tokenizer_are_not_taken_and_the_row_is_counted(
    tiny_tokenizer: PreTrainedTokenizerBase, sampled_row: dict[str, Any]
) -> None:
    other = sampled_row | {"tokenizer": "of another template"}
    pairs, ledger = tokenize_pairs([other, sampled_row], tiny_tokenizer, max_length=200)
    assert pairs[0]["chosen_ids"] == chat.render_completion(tiny_tokenizer, "A shirt costs 12.5")
    assert pairs[1]["chosen_ids"] == sampled_row["token_ids"][0]
    assert ledger.as_dict()["retokenized"] == 1


def test_ids_beside_a_text_that_was_changed_are_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, sampled_row: dict[str, Any]
) -> None:
    changed = sampled_row | {"rejected": [{"role": "assistant", "content": "the answer is 46"}]}
    without_stop = sampled_row | {"token_ids": [sampled_row["token_ids"][0], sampled_row["token_ids"][1][:-1]]}
    for row in (changed, without_stop, sampled_row | {"token_ids": sampled_row["token_ids"][::-1]}):
        with pytest.raises(UserError, match="row s: 'token_ids' are not those of its texts"):
            tokenize_pairs([row], tiny_tokenizer, max_length=200)


def test_fill_completes_the_global_batch_with_weightless_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    pairs, _ = tokenize_pairs(rows, tokenizer, max_length=100)
    filled = fill(pairs, 4, token_id=2)
    assert len(filled) == 8
    assert filled["pair_weight"] == [1.0] * 7 + [0.0]
    assert filled[7] == filler_pair(2) | {"id": None}
    assert fill(filled, 4, token_id=2) is filled


def test_order_is_drawn_per_epoch_and_fillers_come_last() -> None:
    epoch = 0
    sampler = ShuffledFillersLast(real=20, total=24, seed=3, epoch=lambda: epoch)
    first, again = list(sampler), list(sampler)
    epoch = 1
    second = list(sampler)
    assert first == again != second
    for order in (first, second):
        assert sorted(order[:20]) == list(range(20))
        assert order[20:] == [20, 21, 22, 23]


PAIRS = [
    {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "row": 3, "pair_weight": 1.0},
    {"prompt_ids": [4], "chosen_ids": [7, 8, 9], "rejected_ids": [9], "row": -1, "pair_weight": 0.0},
]


def listed(batch: dict[str, torch.Tensor | int]) -> dict[str, Any]:
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def test_packed_pairs_by_hand() -> None:
    assert listed(PairCollator(pad_token_id=0, packed=True)(PAIRS)) == {
        "input_ids": [[5, 6, 7, 4, 7, 8, 9, 5, 6, 8, 9, 4, 9]],
        "attention_mask": [[1] * 13],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1]],
        "cu_seq_lens_q": [0, 3, 7, 11, 13],
        "max_length_q": 4,
        "predictors": [1, 3, 4, 5, 8, 9, 11],
        "targets": [7, 7, 8, 9, 8, 9, 9],
        "completion_mask": [[True, False, False], [True] * 3, [True, True, False], [True, False, False]],
        "pair_weight": [1.0, 0.0],
        "row": [3, -1],
        "routed": [[True] * 3 + [False] * 4 + [True] * 4 + [False] * 2],
    }


def test_padded_pairs_by_hand() -> None:
    """What says of the completions is the same; places are those of the flattened rows."""
    packed, padded = (listed(PairCollator(pad_token_id=0, packed=packed)(PAIRS)) for packed in (True, False))
    assert padded["input_ids"] == [[5, 6, 7, 0], [4, 7, 8, 9], [5, 6, 8, 9], [4, 9, 0, 0]]
    assert padded["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert padded["predictors"] == [1, 4, 5, 6, 9, 10, 12]
    assert padded["routed"] == [[True] * 3 + [False], [False] * 4, [True] * 4, [False] * 4]
    for name in ("targets", "completion_mask", "pair_weight", "row"):
        assert padded[name] == packed[name], name


def test_an_empty_completion_has_a_row_and_an_empty_prompt_is_refused() -> None:
    empty = PAIRS[0] | {"rejected_ids": []}
    batch = listed(PairCollator(pad_token_id=0, packed=True)([empty]))
    assert (batch["completion_mask"], batch["targets"]) == ([[True], [False]], [7])
    with pytest.raises(ValueError, match=r"pairs \[3\]: no prompt token"):
        PairCollator(pad_token_id=0, packed=True)([PAIRS[0] | {"prompt_ids": []}])
