"""Families by languages, as Markdown."""

from collections.abc import Mapping

from data_builders.ecommerce.drafts import Cell


def table(counts: Mapping[str, Mapping[Cell, int]]) -> str:
    """A line for each family, a column for each language; of several counts each cell gives the last / the first."""
    first, *others = counts.values()
    families = list(dict.fromkeys(family for family, _ in first))
    languages = list(dict.fromkeys(language for _, language in first))

    def shown(picked: list[Cell]) -> str:
        return " / ".join(str(sum(count.get(cell, 0) for cell in picked)) for count in (*others, first))

    names = " / ".join([*list(counts)[1:], next(iter(counts))])
    lines = [[names, *languages, "all"], ["---"] * (2 + len(languages))]
    for family in families:
        row = [(family, language) for language in languages]
        lines.append([family, *(shown([cell]) for cell in row), shown(row)])
    columns = [[(family, language) for family in families] for language in languages]
    lines.append(["all", *map(shown, columns), shown([cell for column in columns for cell in column])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
