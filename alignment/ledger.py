"""Where every row and token went: a ledger that adds up, or is an error."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from alignment import atomic


@dataclass
class Ledger:
    """Rows and tokens that went in, came out, and were dropped, by reason."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens_trained: int = 0
    tokens_dropped: int = 0
    retokenized: int = 0  # rows whose sampled token ids are another tokenizer's, so that their text was taken
    truncated: int = 0  # rows that came out without their last tokens, which count as dropped

    def drop(self, reason: str, tokens: int = 0) -> None:
        """Count one row (already counted in `rows_in`) as dropped."""
        self.dropped[reason] += 1
        self.tokens_dropped += tokens

    def dropped_metrics(self) -> dict[str, int]:
        """`dropped.REASON` for each reason, its spaces as underscores."""
        return {f"dropped.{reason.replace(' ', '_')}": count for reason, count in sorted(self.dropped.items())}

    def check(self) -> None:
        if self.rows_in != self.rows_out + self.dropped.total():
            raise AssertionError(f"ledger does not add up: {self}")

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        return {
            "rows_in": self.rows_in,
            "rows_out": self.rows_out,
            "dropped": dict(sorted(self.dropped.items())),
            "tokens_in": self.tokens_in,
            "tokens_trained": self.tokens_trained,
            "tokens_dropped": self.tokens_dropped,
            "retokenized": self.retokenized,
            "truncated": self.truncated,
        }

    def write(self, path: Path) -> None:
        self.check()
        atomic.write_json(path, self.as_dict())
