"""Small tables that hold what every family needs, for the tests of the instructions."""

import csv
import json
from pathlib import Path
from typing import Any

BRANDS = ("Acme", "Borneo", "Cahaya", "Delta")
CATEGORIES = ("Kitchen", "Garden", "Toys", "Office", "Sport")
NOUNS = ("kettle", "rake", "puzzle", "stapler", "racket")
PRODUCTS = 60


def product(number: int) -> dict[str, Any]:
    """A product of every column; prices are whole or have cents."""
    brand, noun = BRANDS[number % 4], NOUNS[number % 5]
    colour = ("red", "blue", "green")[number % 3]
    return {
        "sku": f"P{number}",
        "name": f"{brand} {colour} {noun} mark {number}",
        "brand": brand,
        "price": f"{number + 10}.50" if number % 2 else f"{(number + 1) * 1000}",
        "category": CATEGORIES[number % 5],
        "description": f"A {colour} {noun} that lasts, number {number} of its kind.",
        "attributes": json.dumps({"colour": colour, "weight": f"{number} kg"}),
    }


def review(number: int) -> dict[str, Any]:
    return {
        "text": f"Buyer {number} says it broke after {number} days.",
        "rating": 1 + number % 5,
        "sentiment": "Negative",
    }


def pair(number: int) -> dict[str, Any]:
    """Of an even number the product itself, else the next one."""
    right = {"name": product(number + number % 2)["name"], "price": 3}
    return {"left": product(number)["name"], "right": right, "label": 1 - number % 2}


def query(number: int) -> dict[str, Any]:
    return {"query": f"{NOUNS[number % 5]} number {number}", "title": product(number)["name"], "label": True}


def write_tables(folder: Path) -> dict[str, Any]:
    """The files, and the `tables` of a config over them."""
    with (folder / "products.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(product(0)))
        writer.writeheader()
        writer.writerows(product(number) for number in range(PRODUCTS))
    lines = {
        "reviews": [review(number) for number in range(PRODUCTS)],
        "pairs": [pair(number) for number in range(PRODUCTS)],
        "queries": [query(number) for number in range(PRODUCTS)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"id": "sku", "title": "name"}
    return {
        "products": [{"rows": str(folder / "products.csv"), "columns": columns, "values": {"language": "en"}}],
        **{name: [{"rows": str(folder / f"{name}.jsonl")}] for name in lines},
    }
