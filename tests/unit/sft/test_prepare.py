"""What sft.prepare prints, worked by hand."""

import pyarrow as pa

from sft.cache import REJECTED, SourceRows, TokenizedRows, short
from sft.config import SFTConfig
from sft.mixture import mix
from sft.prepare import describe_mixture, describe_rows
from sft.rendering import SCHEMA


def source(name: str, lengths: list[int], trained: int, reasons: list[str | None]) -> SourceRows:
    kept = [0 if reason else length for length, reason in zip(lengths, reasons, strict=True)]
    columns = {
        "input_ids": [[1] * length for length in kept],
        "trained": [[False] * (length - trained) + [True] * trained if length else [] for length in kept],
        "length": lengths,
        "trained_tokens": [trained if length else 0 for length in kept],
        "reason": reasons,
        "place": [""] * len(lengths),
        "id": [None] * len(lengths),
    }
    return SourceRows(name, [pa.RecordBatch.from_pydict(columns, schema=SCHEMA)])


def test_summary_of_two_sources() -> None:
    rows = TokenizedRows(
        [
            source("a.jsonl", [10, 20, 30, 40, 1000], 5, [None, None, None, None, None]),
            source("b.jsonl", [10, 10, 20], 2, [None, REJECTED[0], REJECTED[2]]),
        ]
    )
    assert describe_rows(rows) == [
        "a.jsonl: 5 rows of 1.1k tokens, 2.3% trained; lengths: median 30, p95 808, longest 1000; rejected: none",
        "b.jsonl: 3 rows of 40 tokens, 5.0% trained; lengths: median 10, p95 19, longest 20; "
        "rejected: 1 nothing to train, 1 a stop token inside a trained turn",
    ]
    config = SFTConfig.model_validate(
        {
            "output_dir": "out",
            "model": {"preset": "compass-tiny", "tokenizer": "t"},
            "sources": [{"rows": "a.jsonl", "count": 4, "epochs": 2}, {"rows": "b.jsonl", "epochs": 10}],
            "packing": {"capacity": 64},
            "training": {"learning_rate": 1.0},
        }
    )
    assert describe_mixture(mix(config, rows)) == [
        "mixture: a.jsonl: 4 of 5 rows drawn; an epoch takes 8 rows of 200 tokens, 66.7%",
        "mixture: b.jsonl: 1 of 3 rows drawn; an epoch takes 10 rows of 100 tokens, 33.3%",
        "5 of 8 rows train, 0 of them truncated; "
        "dropped: 1 a stop token inside a trained turn, 1 nothing to train, 1 overlong",
    ]


def test_large_numbers_are_short() -> None:
    assert [short(n) for n in (0, 999, 1000, 1_234_567, 2.5e9)] == ["0", "999", "1.0k", "1.2M", "2.5G"]
