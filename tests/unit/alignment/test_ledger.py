import json
from pathlib import Path

import pytest

from alignment.ledger import Ledger


def test_ledger_adds_up_and_is_written(tmp_path: Path) -> None:
    ledger = Ledger(rows_in=4, rows_out=1, tokens_in=100, tokens_trained=30)
    ledger.drop("overlong", 40)
    ledger.drop("overlong", 20)
    ledger.drop("empty")
    ledger.write(tmp_path / "ledger.json")
    assert json.loads((tmp_path / "ledger.json").read_text()) == {
        "rows_in": 4,
        "rows_out": 1,
        "dropped": {"empty": 1, "overlong": 2},
        "tokens_in": 100,
        "tokens_trained": 30,
        "tokens_dropped": 60,
        "retokenized": 0,
        "truncated": 0,
    }


@pytest.mark.parametrize("ledger", [Ledger(rows_in=2, rows_out=1), Ledger(rows_in=0, rows_out=1)])
def test_lost_or_doubled_row_is_an_error_and_nothing_is_written(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(AssertionError, match="does not add up"):
        ledger.write(tmp_path / "ledger.json")
    assert list(tmp_path.iterdir()) == []
