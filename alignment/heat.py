"""Completions whose tokens have weights, to be shown as a heat map in the terminal and in the report.

A shade is relative to the even weight, which is a side's mean: 0.5 stands for it, 0 and 1 for the furthest below and
above it among both sides. It is never stretched over less than 5%, so that even weights look even.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

LEAST_REACH = 0.05
NAMED = 4  # heaviest and lightest tokens that are named beside the map
LIGHT, DARK = (238, 241, 247), (36, 92, 190)  # backgrounds of shade 0 and 1


@dataclass(frozen=True)
class Side:
    """A completion as pieces of text, each a token, or the few that share a character."""

    texts: list[str]
    sizes: list[int]  # tokens of a piece
    weights: list[float]  # of each of its tokens, on average

    @property
    def total(self) -> float:
        return sum(weight * size for weight, size in zip(self.weights, self.sizes, strict=True))

    @property
    def even(self) -> float:
        return self.total / max(sum(self.sizes), 1)

    def relative(self) -> list[float]:
        """Weights over the even weight, less 1."""
        return [weight / self.even - 1 if self.even else 0.0 for weight in self.weights]

    def about(self) -> str:
        low, high = min(self.weights, default=0), max(self.weights, default=0)
        return f"{sum(self.sizes)} tokens, weights {low:.3f} to {high:.3f}, sum {self.total:.2f}"

    def extremes(self) -> str:
        """The heaviest and the lightest tokens by name, for eyes and terminals without colour."""
        order = sorted(range(len(self.texts)), key=lambda i: -self.weights[i])
        heaviest, lightest = order[:NAMED], order[NAMED:][-NAMED:]
        return f"heaviest {self._named(heaviest)}" + (f"; lightest {self._named(lightest)}" if lightest else "")

    def _named(self, places: Sequence[int]) -> str:
        return ", ".join(f"{self.texts[i]!r} {self.weights[i]:.3f}" for i in places)


@dataclass(frozen=True)
class WeighedPair:
    """A preference pair with a weight on every token, and numbers that say what made them."""

    id: str
    prompt: str
    chosen: Side
    rejected: Side
    stats: dict[str, float]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "WeighedPair":
        stats = {str(name): float(value) for name, value in row["stats"].items()}
        return cls(str(row["id"]), str(row["prompt"]), _side(row["chosen"]), _side(row["rejected"]), stats)

    def reach(self) -> float:
        """How far the shades 0 and 1 are from the even weight."""
        return max([LEAST_REACH, *map(abs, self.chosen.relative()), *map(abs, self.rejected.relative())])

    def shades(self, side: Side) -> list[float]:
        reach = self.reach()
        return [0.5 + change / (2 * reach) for change in side.relative()]

    def legend(self) -> str:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self.stats.items())
        low, high = max(0.0, 1 - self.reach()), 1 + self.reach()
        return f"shades for {low:.2f}, 1 and {high:.2f} of an even weight; {numbers}"


def _side(row: dict[str, Any]) -> Side:
    return Side(list(map(str, row["texts"])), list(map(int, row["sizes"])), list(map(float, row["weights"])))


def show(pairs: Sequence[WeighedPair], console: Console) -> None:
    """The pairs as shaded text, each with its legend and the tokens of most and least weight."""
    for pair in pairs:
        console.print(Text(f"-- {pair.id}", "bold"))
        console.print(Text(pair.prompt, "dim"), soft_wrap=True)
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            console.print(Text.assemble((name, "bold"), f": {side.about()}"))
            console.print(shaded(side.texts, pair.shades(side)), soft_wrap=True)
            console.print(Text(side.extremes(), "dim"), soft_wrap=True)
        key = shaded([" low ", " even ", " high "], [0, 0.5, 1])
        console.print(Text.assemble(key, f" {pair.legend()}\n"), soft_wrap=True)


def shaded(texts: Sequence[str], shades: Sequence[float]) -> Text:
    text = Text()
    for piece, shade in zip(texts, shades, strict=True):
        red, green, blue = (round(a + shade * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
        ink = Color.from_rgb(255, 255, 255) if shade > 0.55 else Color.from_rgb(16, 18, 22)
        text.append(piece.replace("\n", "↵\n"), Style(color=ink, bgcolor=Color.from_rgb(red, green, blue)))
    return text
