from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignment import chat, tokenizer
from alignment.errors import UserError
from alignment.rows import write_rows

TEXTS = [
    "3 shirts at 12.5",
    "ส้มสามผล 45 บาท",
    "苹果每个三元",
    "ba cái áo",
    "😀 \t\n  x",
    chat.THINK_START + "a" + chat.THINK_END,
]


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    messages = [{"role": "user", "content": " ".join(TEXTS)}, {"role": "assistant", "content": "37.5 37.5 37.5"}]
    write_rows(path, [{"messages": messages}] * 20)
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text


def test_each_digit_is_a_token_but_round_thousands_are_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert tiny_tokenizer.tokenize("37.512") == ["3", "7", ".", "5", "1", "2"]
    assert tiny_tokenizer.tokenize("45.000 1,000,000") == ["4", "5", ".000", "Ġ", "1", ",000", ",000"]
    with_digits = {piece for piece in tiny_tokenizer.get_vocab() if set(piece) & set("0123456789")}
    assert with_digits == set("0123456789") | {".000", ",000"}


def test_a_token_across_words_ends_at_a_digit() -> None:
    lines = ["2 x 30 = 60. Answer: 60", "4 x 50 = 200. Answer: 200"] * 20
    apart, joined = (tokenizer.train(iter(lines), 400, 64, across_words=across) for across in (False, True))
    assert apart.tokenize("4 x 50. Answer: 200") == [*("4", "Ġx", "Ġ", "5", "0", "."), "ĠAnswer", ":", "Ġ", *"200"]
    assert joined.tokenize("4 x 50. Answer: 200") == ["4", "ĠxĠ", "5", "0", ".ĠAnswer:Ġ", *"200"]
    assert joined.decode(joined("4 x 50. Answer: 200")["input_ids"]) == "4 x 50. Answer: 200"


def test_marks_are_single_tokens_and_thinking_is_kept_as_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    marks = [chat.PAD, chat.TURN_START, chat.TURN_END, chat.THINK_START, chat.THINK_END]
    size = len(tiny_tokenizer)
    ids = tiny_tokenizer("".join(marks))["input_ids"]
    assert ids == tiny_tokenizer.convert_tokens_to_ids(marks) == [0, 1, 2, size - 2, size - 1]
    assert (tiny_tokenizer.pad_token_id, tiny_tokenizer.eos_token_id) == (0, 2)
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == chat.THINK_START + chat.THINK_END


def test_job_writes_a_folder_that_transformers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tokenizer.yaml"
    config.write_text(f"output_dir: {tmp_path / 'out'}\nrows: [{rows(tmp_path)}]\nvocab_size: 320\nmax_length: 64\n")
    assert tokenizer.main(["--config", str(config)]) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert (len(loaded), loaded.model_max_length, loaded.eos_token) == (320, 64, chat.TURN_END)
    rendered = chat.render(loaded, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>"}])
    assert rendered.assistant_mask.count(True) == 2
    assert loaded.decode(rendered.input_ids, skip_special_tokens=True).endswith("<think>\n")
    assert capsys.readouterr().err == ""
    assert tokenizer.main(["--config", str(config)]) == 0
    assert capsys.readouterr().out == f"alignment.tokenizer: done already, see {tmp_path / 'out'}\n"


def test_same_rows_give_the_same_tokenizer() -> None:
    trained = [tokenizer.train(iter(TEXTS * 5), 320, 64).get_vocab() for _ in range(2)]
    assert trained[0] == trained[1]


def test_plan_checks_the_rows(tmp_path: Path) -> None:
    config = tokenizer.TokenizerConfig(output_dir=tmp_path / "out", rows=[str(tmp_path / "missing.jsonl")])
    with pytest.raises(UserError, match=r"missing\.jsonl: no such file"):
        tokenizer.plan(config)


def test_compression_by_hand() -> None:
    """Without merges ASCII is one character a token, and Thai one character in three."""
    made = tokenizer.train(iter(["a"]), 300, 64)
    assert tokenizer.compression(made, iter(["abcd", "ab"])) == {"characters_per_token": 1.0}
    assert tokenizer.compression(made, iter(["ผล"])) == {"characters_per_token": 0.333}
