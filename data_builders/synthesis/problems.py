"""The arithmetic of each template, without language: draw the numbers, work them exactly.

Prices are drawn in units of the locale's `money_unit`; `in_currency` scales them before they are solved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Literal, TypeVar, get_args

Template = Literal["unit_price", "discount", "voucher", "bundle", "shipping", "change", "stock", "comparison"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
Operator = Literal["+", "-", "x", "/", "%"]
Numbers = dict[str, Decimal]
T = TypeVar("T")

NOT_MONEY = frozenset(
    {"count", "weight", "wanted", "percent", "start", "orders", "each", "delivered", "small", "large"}
)
# Round, as prices are: in the minutes of the demo, sums of tens are learnt far better than sums of units.
COUNTS = range(2, 10)
PRICES = range(10, 110, 10)
WEIGHTS = ("2", "3", "4", "5", "6", "7", "8", "9", "2.5")
PAYMENTS = (50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Step:
    """One line of working: `left operator right = result`."""

    left: Decimal
    operator: Operator
    right: Decimal
    result: Decimal

    def written(self, number: Callable[[Decimal], str]) -> str:
        """`3 x 125 = 375`, or `375 x 20% = 75`."""
        operator, sign = ("x", "%") if self.operator == "%" else (self.operator, "")
        return f"{number(self.left)} {operator} {number(self.right)}{sign} = {number(self.result)}"


@dataclass(frozen=True)
class Comparison:
    """One line of working that compares a total with a minimum."""

    total: Decimal
    minimum: Decimal

    @property
    def reached(self) -> bool:
        return self.total >= self.minimum

    def written(self, number: Callable[[Decimal], str]) -> str:
        return f"{number(self.total)} {'>=' if self.reached else '<'} {number(self.minimum)}"


@dataclass(frozen=True)
class Solution:
    """The working in order."""

    lines: tuple[Step | Comparison, ...]

    @property
    def last_step(self) -> Step:
        return [line for line in self.lines if isinstance(line, Step)][-1]

    @property
    def answer(self) -> Decimal:
        return self.last_step.result


def draw(template: Template, rng: Random) -> Numbers:
    """The random numbers of one problem, by name, in a fixed order."""
    return _PROBLEMS[template][0](rng)


def in_currency(numbers: Numbers, money_unit: int) -> Numbers:
    """The same problem with its prices multiplied by what one unit is worth."""
    return {name: value if name in NOT_MONEY else value * money_unit for name, value in numbers.items()}


def solve(template: Template, numbers: Numbers) -> Solution:
    return _PROBLEMS[template][1](numbers)


def reverse(step: Step) -> Step:
    """The sum that checks a step: 375 - 50 = 325 is checked by 325 + 50 = 375."""
    match step.operator:
        case "+":
            return work(step.result, "-", step.right)
        case "-":
            return work(step.result, "+", step.right)
        case "x":
            return work(step.result, "/", step.right)
        case "/" | "%":
            raise AssertionError(f"no template ends in {step.operator!r}")


def work(left: Decimal, operator: Operator, right: Decimal) -> Step:
    """Work one step exactly."""
    match operator:
        case "+":
            result = left + right
        case "-":
            result = left - right
        case "x":
            result = left * right
        case "%":
            result = left * right / 100
        case "/":
            result = left / right
            assert result * right == left, f"{left} / {right} is not exact"
    return Step(left, operator, right, result)


def pick(rng: Random, choices: Sequence[T]) -> T:
    """A uniform choice from `random()` alone, the only method whose sequence Python promises to keep."""
    return choices[int(rng.random() * len(choices))]


def _numbers(**values: int | Decimal) -> Numbers:
    return {name: Decimal(value) for name, value in values.items()}


def _minimum(rng: Random, total: int) -> int:
    """A round minimum that `total` (at least 20) reaches in half of the draws, now and then exactly."""
    grain = 50 if total >= 200 else 10
    nearest = total // grain * grain
    if rng.random() < 0.5:
        return max(nearest - grain * pick(rng, range(3)), 20)
    return nearest + grain * pick(rng, range(1, 4))


# One pair of functions per template: draw its numbers, solve it.


def _draw_unit_price(rng: Random) -> Numbers:
    weight = Decimal(pick(rng, WEIGHTS))
    unit = pick(rng, PRICES)
    wanted = pick(rng, [kg for kg in COUNTS if kg != weight])
    return _numbers(weight=weight, price=weight * unit, wanted=wanted)


def _solve_unit_price(n: Numbers) -> Solution:
    unit = work(n["price"], "/", n["weight"])
    return Solution((unit, work(unit.result, "x", n["wanted"])))


def _draw_discount(rng: Random) -> Numbers:
    count, price = pick(rng, COUNTS), pick(rng, PRICES)
    return _numbers(count=count, price=price, percent=pick(rng, range(10, 100, 10)))


def _solve_discount(n: Numbers) -> Solution:
    total = work(n["count"], "x", n["price"])
    off = work(total.result, "%", n["percent"])
    return Solution((total, off, work(total.result, "-", off.result)))


def _draw_voucher(rng: Random) -> Numbers:
    count, price = pick(rng, COUNTS), pick(rng, PRICES)
    minimum = _minimum(rng, count * price)
    off = pick(rng, range(10, min(minimum, 40), 10))
    return _numbers(count=count, price=price, minimum=minimum, off=off)


def _solve_voucher(n: Numbers) -> Solution:
    total = work(n["count"], "x", n["price"])
    comparison = Comparison(total.result, n["minimum"])
    if comparison.reached:
        return Solution((total, comparison, work(total.result, "-", n["off"])))
    return Solution((total, comparison))


def _draw_bundle(rng: Random) -> Numbers:
    first = pick(rng, range(20, 110, 10))
    second = pick(rng, range(10, first, 10))  # the dearer product first: swapped, it would be the same problem
    saving = pick(rng, range(10, min(second, 30) + 10, 10))
    return _numbers(first=first, second=second, pack=first + second - saving, count=pick(rng, COUNTS))


def _solve_bundle(n: Numbers) -> Solution:
    apart = work(n["first"], "+", n["second"])
    saving = work(apart.result, "-", n["pack"])
    return Solution((apart, saving, work(saving.result, "x", n["count"])))


def _draw_shipping(rng: Random) -> Numbers:
    count, price = pick(rng, COUNTS), pick(rng, PRICES)
    free_from = _minimum(rng, count * price)
    return _numbers(count=count, price=price, fee=pick(rng, range(10, 40, 10)), free_from=free_from)


def _solve_shipping(n: Numbers) -> Solution:
    total = work(n["count"], "x", n["price"])
    comparison = Comparison(total.result, n["free_from"])
    if comparison.reached:
        return Solution((total, comparison))
    return Solution((total, comparison, work(total.result, "+", n["fee"])))


def _draw_change(rng: Random) -> Numbers:
    count, price, extra = pick(rng, COUNTS), pick(rng, PRICES), pick(rng, PRICES[:-1])
    paid = next(payment for payment in PAYMENTS if payment > count * price + extra)
    return _numbers(count=count, price=price, extra=extra, paid=paid)


def _solve_change(n: Numbers) -> Solution:
    several = work(n["count"], "x", n["price"])
    total = work(several.result, "+", n["extra"])
    return Solution((several, total, work(n["paid"], "-", total.result)))


def _draw_stock(rng: Random) -> Numbers:
    start, delivered = pick(rng, range(200, 1000, 100)), pick(rng, range(10, 100, 10))
    return _numbers(start=start, orders=pick(rng, COUNTS), each=pick(rng, (10, 20)), delivered=delivered)


def _solve_stock(n: Numbers) -> Solution:
    sold = work(n["orders"], "x", n["each"])
    left = work(n["start"], "-", sold.result)
    return Solution((sold, left, work(left.result, "+", n["delivered"])))


def _draw_comparison(rng: Random) -> Numbers:
    small = pick(rng, range(2, 5))  # the smaller pack first: swapped, it would be the same problem
    large = pick(rng, range(small + 1, 10))
    unit = pick(rng, range(20, 110, 10))
    gap = pick(rng, (-1, 1)) * pick(rng, range(10, min(unit, 40), 10))
    return _numbers(small=small, small_price=small * unit, large=large, large_price=large * (unit + gap))


def _solve_comparison(n: Numbers) -> Solution:
    small = work(n["small_price"], "/", n["small"])
    large = work(n["large_price"], "/", n["large"])
    cheap, dear = sorted((small.result, large.result))
    return Solution((small, large, work(dear, "-", cheap)))


_PROBLEMS: dict[Template, tuple[Callable[[Random], Numbers], Callable[[Numbers], Solution]]] = {
    "unit_price": (_draw_unit_price, _solve_unit_price),
    "discount": (_draw_discount, _solve_discount),
    "voucher": (_draw_voucher, _solve_voucher),
    "bundle": (_draw_bundle, _solve_bundle),
    "shipping": (_draw_shipping, _solve_shipping),
    "change": (_draw_change, _solve_change),
    "stock": (_draw_stock, _solve_stock),
    "comparison": (_draw_comparison, _solve_comparison),
}
