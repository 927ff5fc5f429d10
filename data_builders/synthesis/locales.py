"""How each language writes numbers and money."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, get_args

Language = Literal["en", "zh", "id", "ms", "th", "vi", "tl", "pt"]
LANGUAGES: tuple[Language, ...] = get_args(Language)


@dataclass(frozen=True)
class Locale:
    """Separators, currency, and what one unit of a drawn price is worth in that currency."""

    currency: str
    thousands: str = ","
    decimal: str = "."
    money_unit: int = 1

    def number(self, value: Decimal) -> str:
        """1234.5 -> `1,234.5` or `1.234,5`; no trailing zeros."""
        return self._separated(f"{Decimal(plain(value)):,}")

    def money(self, value: Decimal) -> str:
        """1234.5 -> `$1,234.50`; a whole amount has no decimals."""
        digits = f"{value:,.0f}" if value == value.to_integral_value() else f"{value:,.2f}"
        return self.currency.format(self._separated(digits))

    def _separated(self, digits: str) -> str:
        return digits.translate(str.maketrans(",.", self.thousands + self.decimal))


def plain(value: Decimal) -> str:
    """The canonical machine form: `1234.5`, `3250`; no separators, no exponent, no trailing zeros."""
    return f"{value.normalize():f}"


# Indonesian and Vietnamese prices come in thousands, so a drawn price of 12 reads Rp12.000 there.
LOCALES: dict[Language, Locale] = {
    "en": Locale("${}"),
    "zh": Locale("{}元"),
    "id": Locale("Rp{}", thousands=".", decimal=",", money_unit=1000),
    "ms": Locale("RM{}"),
    "th": Locale("{} บาท"),
    "vi": Locale("{} đồng", thousands=".", decimal=",", money_unit=1000),
    "tl": Locale("₱{}"),
    "pt": Locale("R$ {}", thousands=".", decimal=","),
}
