import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from alignment import chat, inspect_model, inspect_rows
from alignment.errors import UserError
from alignment.inspect_rows import Piece, RowsReport
from alignment.models import ModelConfig, load_tokenizer


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shown(report: RowsReport, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200, **options)
    inspect_rows.show(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# models


def test_compass_v2() -> None:
    model = inspect_model.inspect_model("compass-v2")
    assert model.shape == {
        "layers": "30",
        "hidden size": "3,072",
        "attention heads": "24 query, 6 key-value",
        "head dimension": "128",
        "vocabulary": "128,000",
        "context": "32,768",
        "experts": "2 shared + 48 routed, top-4",
        "expert width": "2,048",
    }
    assert model.cache_values == 2 * 30 * 6 * 128
    console = Console(file=io.StringIO(), width=120)
    console.print(inspect_model.table(model))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "29.8B total, 4.9B active (29,810,385,312, 4,896,219,552)" in text
    assert f"{29_810_385_312 * 16 / 2**30:.1f} GiB  float32, AdamW (16 bytes a parameter)" in text
    assert f"{29_810_385_312 * 2 / 2**30:.1f} GiB  bfloat16, and 90 KiB of cache a token" in text


def test_compass_v3() -> None:
    """16 experts, top-4, and both totals of the report within 2%; the widths are assumptions."""
    model = inspect_model.inspect_model("compass-v3")
    assert model.shape["experts"] == "16 routed, top-4"
    assert model.parameters.total == pytest.approx(245e9, rel=0.02)
    assert model.parameters.active == pytest.approx(71e9, rel=0.02)


# Hidden size 32, vocabulary 48, 2 layers, 4 heads of 8 (latent attention: of 4 + 4 and 8), 2 of 4 experts of width 16.
EMBEDDINGS, EXPERT = 2 * 48 * 32, 3 * 32 * 16
GROUPED = 32 * 32 + 2 * 32 * 16 + 32 * 32  # 2 key-value heads
LATENT = (32 * 8 + 8 + 8 * 32) + (32 * 12 + 8 + 8 * 48) + 32 * 32  # rank 8 for queries, 8 + 4 for keys and values
NORMS, ROUTER, DENSE = 2 * 32, 4 * 32, 3 * 32 * 32
SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = SIZES | {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
DEEPSEEK_REST = 2 * (LATENT + NORMS) + DENSE + ROUTER + EXPERT  # the shared expert
FAMILIES: dict[str, tuple[dict[str, Any], int, int, dict[str, str], int]] = {
    # config; parameters beside embeddings, last norm and routed experts; width of these; lines; cached a token
    "qwen3_moe": (
        SIZES | {"num_experts": 4, "head_dim": 8}, 2 * (GROUPED + 2 * 8 + NORMS + ROUTER), 16,
        {"experts": "4 routed, top-2", "expert width": "16"}, 2 * 2 * 2 * 8,
    ),
    "qwen2_moe": (
        SIZES | {"num_experts": 4, "shared_expert_intermediate_size": 24},
        2 * (GROUPED + 32 + 2 * 16 + NORMS + ROUTER + 3 * 32 * 24 + 32), 16,
        {"experts": "1 shared of width 24 + 4 routed, top-2", "expert width": "16"}, 2 * 2 * 2 * 8,
    ),
    "mixtral": (
        SIZES | {"num_local_experts": 4, "moe_intermediate_size": None}, 2 * (GROUPED + NORMS + ROUTER), 32,
        {"experts": "4 routed, top-2", "expert width": "32"}, 2 * 2 * 2 * 8,
    ),
    "deepseek_v2": (
        DEEPSEEK | {"topk_method": "greedy"}, DEEPSEEK_REST, 16,
        {"experts": "1 shared + 4 routed, top-2", "dense layers": "1, of width 32"}, 2 * (8 + 4),
    ),
    "deepseek_v3": (
        DEEPSEEK, DEEPSEEK_REST, 16,
        {"attention heads": "4, latent of rank 8", "head dimension": "keys 4 + 4 rotary, values 8"}, 2 * (8 + 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_by_hand(family: str, tmp_path: Path) -> None:
    """A token passes 2 of the 4 routed experts of every layer that has some; all else is active."""
    config, rest, width, lines, cached = FAMILIES[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    model = inspect_model.inspect_model(str(tmp_path))
    routed = (1 if "deepseek" in family else 2) * 3 * 32 * width
    assert model.parameters.total == EMBEDDINGS + 32 + rest + 4 * routed
    assert model.parameters.active == EMBEDDINGS + 32 + rest + 2 * routed
    assert {key: model.shape[key] for key in lines} == lines
    assert model.cache_values == cached


def test_folder_is_inspected_without_its_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())
    model = inspect_model.inspect_model(str(tmp_path))
    assert model.shape["experts"] == "1 shared + 4 routed, top-2"
    assert model.shape["vocabulary"].endswith("(tied)")
    assert model.parameters.total > model.parameters.active > 0


def test_dense_model_has_no_experts(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 100,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = inspect_model.inspect_model(str(tmp_path))
    assert model.shape["feed-forward width"] == "64"
    assert "experts" not in model.shape
    assert model.parameters.total == model.parameters.active


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "neither a preset nor a folder with a config.json"),
        ("{", "the config could not be read: It looks like the config file"),
        ('{"model_type": "unheard_of"}', "the config could not be read: The checkpoint you are trying to load"),
        ('{"model_type": "t5"}', "not a causal language model: Unrecognized configuration class"),
    ],
)
def test_model_that_cannot_be_inspected(tmp_path: Path, config: str | None, expected: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        inspect_model.inspect_model(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: {expected}")


def test_misspelt_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"compass-v22: neither .*; did you mean 'compass-v2'\?"):
        inspect_model.inspect_model("compass-v22")


# rows


def test_counts_lengths_and_clean_rows(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"id": str(i), "language": ("en", "th", "en")[i], "kind": "math", "messages": turns("ส้ม 3?", "3" * (i + 1))}
        for i in range(3)
    ]
    report = inspect_rows.inspect_rows(write(tmp_path, rows), tiny_tokenizer, count=1)
    assert (report.rows, report.kind, report.unit) == (3, "messages", "tokens")
    assert report.languages == {"en": 2, "th": 1}
    assert report.kinds == {"math": 3}
    assert report.lengths == [len(chat.render(tiny_tokenizer, row["messages"]).input_ids) for row in rows]
    assert report.anomalies == {}
    assert [sample.name for sample in report.samples] == ["0"]
    assert "no anomalies" in shown(report)


def test_pieces_spell_the_conversation_with_its_mask(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Also where one character takes several tokens, as the emoji does, and a byte that is never finished."""
    messages = turns("苹果 giá?", "x 😀 สวัสดี")
    report = inspect_rows.inspect_rows(write(tmp_path, [{"messages": messages}]), tiny_tokenizer, 1)
    pieces = report.samples[0].pieces
    assert "".join(p.text for p in pieces) == tiny_tokenizer.decode(chat.render(tiny_tokenizer, messages).input_ids)
    assert "".join(p.text for p in pieces if p.trained) == "x 😀 สวัสดี<|im_end|>"
    assert "😀" in [p.text for p in pieces]
    torn = chat.Rendered(
        tiny_tokenizer("a😀")["input_ids"][:-1], [True] * (len(tiny_tokenizer("a😀")["input_ids"]) - 1)
    )
    view = inspect_rows.TokenView([], messages, tiny_tokenizer, torn)
    assert view.pieces() == [Piece("a", True), Piece("\ufffd", True)]


def test_trained_tokens_are_marked_with_and_without_colour() -> None:
    pieces = [Piece("user", False), Piece("\n", False), Piece("y", True), Piece("es", True), Piece("\n", False)]
    plain = inspect_rows.marked(pieces, colour=False)
    assert plain.plain == "user▏↵\n⟦y▏es⟧↵"
    coloured = inspect_rows.marked(pieces, colour=True)
    assert coloured.plain == "user▏↵\ny▏es↵"
    assert [(coloured.plain[s.start : s.end], str(s.style)) for s in coloured.spans] == [
        ("user▏↵\n", "dim"),
        ("y▏es", "bold green"),
        ("↵", "dim"),
    ]


def test_file_gets_brackets_and_terminal_gets_colour(tmp_path: Path) -> None:
    path = write(tmp_path, [{"id": "r[1]", "messages": turns("a [b]", "c [/b]")}])
    report = inspect_rows.inspect_rows(path)
    assert report.unit == "characters"
    assert report.lengths == [len("a [b]") + len("c [/b]")]
    plain = shown(report)
    assert "-- r[1]   (trained: ⟦...⟧)\nuser: ▏a [b]▏↵\n▏assistant: ⟦c [/b]⟧↵\n" in plain
    assert "\x1b" not in plain
    coloured = shown(report, force_terminal=True, color_system="standard")
    assert "⟦" not in coloured
    assert "\x1b[1;32mc [/b]\x1b[0m" in coloured


ANOMALIES = [
    ("empty content", {"messages": turns("", "x")}),
    ("empty content", {"messages": turns("x", " \n")}),
    ("no assistant turn: nothing to train", {"messages": turns("x")}),
    ("replacement character \ufffd: the text was decoded wrongly", {"messages": turns("a\ufffdb", "x")}),
    ("longer than the tokenizer's model_max_length of 128 tokens", {"messages": turns("3" * 128, "x")}),
]


@pytest.mark.parametrize(("anomaly", "row"), ANOMALIES)
def test_anomaly_is_found_and_its_row_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, anomaly: str, row: dict[str, Any]
) -> None:
    clean = {"messages": turns("a", "b")}
    path = write(tmp_path, [clean, row, clean])
    report = inspect_rows.inspect_rows(path, tiny_tokenizer)
    assert report.anomalies == {anomaly: [2]}
    assert f"anomaly: {anomaly}: 1 of 3 rows: 2" in shown(report)


def test_duplicate_ids_and_long_lists_of_rows(tmp_path: Path) -> None:
    report = inspect_rows.inspect_rows(write(tmp_path, [{"id": "a", "messages": turns("a", "b")}] * 12))
    assert report.anomalies == {"duplicate id": list(range(2, 13))}
    assert "duplicate id: 11 of 12 rows: 2, 3, 4, 5, 6, 7, 8, 9, ..." in shown(report)


def test_stop_token_that_is_not_trained(tmp_path: Path, tiny_model_folder: Path) -> None:
    """A template whose marks leave the stop token out: the model would never learn to stop."""
    tokenizer = load_tokenizer(ModelConfig(path=str(tiny_model_folder)))
    tokenizer.chat_template = chat.CHATML.replace(
        "said.text + '<|im_end|>' -}}{%- endgeneration -%}",
        "said.text -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    report = inspect_rows.inspect_rows(write(tmp_path, [{"messages": turns("a", "b", "c", "d")}]), tokenizer)
    assert report.anomalies == {"an assistant turn whose stop token is not trained": [1]}


def test_preference_and_prompt_rows(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Only the answers of a preference row are trained, not the assistant's turns before them."""
    answer, worse = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    row = {"id": "p", "prompt": turns("a", "b", "c"), "chosen": answer, "rejected": worse}
    report = inspect_rows.inspect_rows(write(tmp_path, [row]), tiny_tokenizer)
    assert report.anomalies == {}
    assert [sample.name for sample in report.samples] == ["p chosen", "p rejected"]
    trained = ["".join(p.text for p in sample.pieces if p.trained) for sample in report.samples]
    assert trained == ["yes<|im_end|>", "no<|im_end|>"]

    report = inspect_rows.inspect_rows(write(tmp_path, [{"prompt": turns("a")}]), tiny_tokenizer)
    assert (report.kind, report.anomalies) == ("prompt", {})
    assert report.lengths == [len(chat.render_prompt(tiny_tokenizer, turns("a")))]
    assert not any(piece.trained for piece in report.samples[0].pieces)


def test_rows_that_no_job_could_read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the first row has none of messages, chosen, prompt; did you mean 'mesages'"):
        inspect_rows.inspect_rows(write(tmp_path, [{"mesages": []}]))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: row has no 'messages'"):
        inspect_rows.inspect_rows(write(tmp_path, [{"messages": turns("a")}, {"prompt": turns("a")}]))


def test_histogram_by_hand() -> None:
    """Lengths 1 to 24 make 12 bins of 2; the fullest takes the whole width, and one that holds a single row shows."""
    lines = inspect_rows.histogram([1] * 200 + [2] * 200 + [12] + [24] * 100)
    assert len(lines) == 12
    assert lines[0] == "   1-2  " + "█" * 40 + " 400"
    assert lines[5] == "  11-12 " + "█" + " " * 39 + " 1"
    assert lines[1] == "   3-4  " + " " * 40 + " 0"
    assert lines[11] == "  23-24 " + "█" * 10 + " " * 30 + " 100"
    assert inspect_rows.histogram([7, 7]) == ["  7-7 " + "█" * 40 + " 2"]
