"""The matrix of adapters and languages: worked by hand, shown, drawn."""

import math
from pathlib import Path

import numpy as np
import pytest

from sft import interference, interference_picture
from sft.interference import Matrix, as_metrics, matrix, table

LANGUAGES = ["th", "id", "th", "id", "th"]
GROUPS = {"thai": ["th"], "malay": ["id"]}


@pytest.fixture
def found() -> Matrix:
    """The Thai adapter takes 1, 2 and 3 nats off Thai rows, and adds 0.5 to each Indonesian one."""
    base_R = np.array([4.0, 2.0, 5.0, 3.0, 6.0])
    losses = {
        "base": base_R,
        "thai": base_R + np.array([-1.0, 0.5, -2.0, 0.5, -3.0]),
        "malay": base_R + np.array([0.1, -1.0, -0.1, -1.0, 0.0]),
        "joint": base_R - 1,
    }
    return matrix(losses, LANGUAGES)


def test_changes_are_paired_by_row(found: Matrix) -> None:
    """Thai rows under the base: 4, 5, 6; changes -1, -2, -3: mean -2, deviation 1, half = 4.3027 / sqrt(3) = 2.4842."""
    assert list(found) == ["base", "thai", "malay", "joint"] and list(found["base"]) == ["id", "th"]
    own = found["thai"]["th"]
    assert (own.rows, own.loss, own.perplexity) == (3, 3.0, pytest.approx(math.exp(3)))
    assert own.over_base.value == -2 and own.over_base.high == pytest.approx(-2 + 2.4842, abs=1e-4)
    assert own.over_joint is not None and own.over_joint.value == -1
    harmed = found["thai"]["id"].over_base
    assert (harmed.value, harmed.low, harmed.high) == (0.5, 0.5, 0.5)
    assert found["base"]["th"].over_base.value == 0


def test_metrics_count_what_is_harmed_elsewhere(found: Matrix) -> None:
    """Of two foreign cells Thai on Indonesian is worse for sure, Malay on Thai (0.1, -0.1, 0) is not."""
    metrics = as_metrics(found, GROUPS)
    assert (metrics["interference.foreign"], metrics["interference.harmed"]) == (2, 1)
    assert metrics["thai.id.over_base"] == 0.5 and metrics["malay.th.over_joint"] == pytest.approx(1.0)
    assert "base.th.over_base" not in metrics and "joint.th.over_joint" not in metrics


def test_the_table_marks_an_adapters_own_languages(found: Matrix) -> None:
    lines = table(found, GROUPS).splitlines()
    assert lines[2] == "| model | id (2 rows) | th (3 rows) |"
    assert lines[5] == "| thai | 20.09 | **20.09** |"
    against = lines.index("Change of the loss against base, in nats a token, with 95% intervals:")
    assert lines[against + 4] == "| thai | +0.500 [+0.500, +0.500] | **-2.000 [-4.484, +0.484]** |"
    assert sum(line.startswith("Change") for line in lines) == 2


def test_without_a_joint_adapter_there_is_one_comparison(tmp_path: Path) -> None:
    losses = {"base": np.ones(5), "thai": np.zeros(5)}
    alone = matrix(losses, LANGUAGES)
    assert alone["thai"]["id"].over_joint is None
    assert "joint" not in table(alone, GROUPS)
    interference_picture.draw(alone, {"thai": ["th"]}, tmp_path / "alone.png")
    assert (tmp_path / "alone.png").read_bytes().startswith(b"\x89PNG")


def test_an_uncertain_change_is_shown_in_brackets(
    found: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(interference_picture.Axes, "text", lambda self, x, y, text, **_: texts.append(text))
    interference_picture.draw(found, GROUPS, tmp_path / "map.png")
    assert texts[:4] == ["+0.50", "(-2.00)", "-1.00", "(+0.00)"]


def test_foreign_cells(found: Matrix) -> None:
    assert [(name, language) for name, language, _ in interference.foreign(found, GROUPS)] == [
        ("thai", "id"),
        ("malay", "th"),
    ]
