"""Shades and names of weighted tokens, and the report's section that shows them."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from alignment.heat import Side, WeighedPair, show
from alignment.report import weights
from alignment.report.collect import collect
from alignment.report.page import Heading, HeatMap, Page, render
from alignment.rows import write_rows

CHOSEN = Side(["a", "ไ", " b"], [1, 2, 1], [0.5, 1.0, 1.5])
PAIR = WeighedPair("x/1", "how <much>?", CHOSEN, Side(["c", "<d>"], [1, 1], [2.0, 2.0]), {"tau": 4.0, "mass": 0.9})


def test_shades_are_relative_to_the_even_weight() -> None:
    """Four tokens of weight .5, 1, 1, 1.5: even 1, so -.5, 0, +.5 of it; the other side is even."""
    assert CHOSEN.total == 4.0
    assert CHOSEN.even == 1.0
    assert PAIR.reach() == 0.5
    assert PAIR.shades(CHOSEN) == [0.0, 0.5, 1.0]
    assert PAIR.shades(PAIR.rejected) == [0.5, 0.5]


def test_small_differences_stay_small() -> None:
    """1% of 5%: shade .5 + .01 / .1."""
    side = Side(["a", "b"], [1, 1], [0.99, 1.01])
    pair = WeighedPair("x", "", side, side, {})
    assert pair.shades(side) == pytest.approx([0.4, 0.6])


def test_weights_of_nothing() -> None:
    empty, zero = Side([], [], []), Side(["a"], [1], [0.0])
    assert WeighedPair("x", "", empty, zero, {}).shades(zero) == [0.5]
    assert empty.about() == "0 tokens, weights 0.000 to 0.000, sum 0.00"


def test_the_terminal_shades_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    show([PAIR], Console(force_terminal=True, color_system="truecolor", width=200))
    coloured = capsys.readouterr().out
    assert "\x1b[38;2;16;18;22;48;2;238;241;247ma\x1b[0m" in coloured  # shade 0
    assert "\x1b[38;2;255;255;255;48;2;36;92;190m b\x1b[0m" in coloured  # shade 1
    show([PAIR], Console(no_color=True, width=200))
    plain = capsys.readouterr().out
    assert (
        "chosen: 4 tokens, weights 0.500 to 1.500, sum 4.00\naไ b\nheaviest ' b' 1.500, 'ไ' 1.000, 'a' 0.500\n" in plain
    )
    assert "shades for 0.50, 1 and 1.50 of an even weight; tau 4, mass 0.9" in plain


def test_the_report_shows_the_last_round(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / "online" / f"round_{number}" / "train"
        folder.mkdir(parents=True)
        write_rows(folder / "token_weights.jsonl", [asdict(PAIR) | {"id": f"round {number}"}])
    (tmp_path / "online" / "round_3").mkdir()  # not yet trained
    (tmp_path / "job.yaml").write_text(f"output_dir: {tmp_path / 'online'}\n")
    stages = [{"name": "online", "job": "dpo.online", "config": str(tmp_path / "job.yaml")}]
    (tmp_path / "pipe.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path), "stages": stages}))
    [section] = weights.sections(collect(tmp_path / "pipe.yaml"))
    heading, heat = section.blocks
    assert isinstance(heading, Heading)
    assert heading.text == "online, round 2"
    assert isinstance(heat, HeatMap)
    assert heat.title == "round 2"
    page = render(Page("p", "h", "d", [], [section], "f"))
    assert '<span style="--shade: 0%">a</span><span style="--shade: 50%">ไ</span>' in page
    assert "how &lt;much&gt;?" in page
    assert "&lt;d&gt;</span>" in page


def test_no_section_without_weights(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(f"output_dir: {tmp_path / 'dpo'}\n")
    stages = [{"name": "dpo", "job": "dpo.train", "config": str(tmp_path / "job.yaml")}]
    (tmp_path / "pipe.yaml").write_text(yaml.safe_dump({"output_dir": str(tmp_path), "stages": stages}))
    assert weights.sections(collect(tmp_path / "pipe.yaml")) == []
