"""Mistakes that the user can mend, as opposed to ours."""

import difflib
from collections.abc import Iterable

MOST_NAMES = 20


class UserError(Exception):
    """A mistake of the user's: config, data, a missing model, an impossible combination.

    The message is one to three lines that name the file, line or key, what was expected and the nearest valid name.
    Jobs print it without a traceback and exit with code 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None where none is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint to append to an error: `; did you mean 'x'?`, or the valid names where none is near and they are few."""
    names = sorted(choices)
    match = nearest(word, names)
    if match is not None:
        return f"; did you mean {match!r}?"
    return f"; valid names: {', '.join(names)}" if 0 < len(names) <= MOST_NAMES else ""
