"""Which adapter answers a prompt: that of the prompt's language."""

from collections import Counter

from alignment import languages
from alignment.config import EngineConfig
from alignment.rows import Row

BASE, UNKNOWN = "base", "unknown"  # languages without an adapter, and prompts whose language is in doubt


class Routes:
    """Chooses an adapter for each prompt, and counts."""

    def __init__(self, config: EngineConfig) -> None:
        """
        Raises:
            UserError: `config.detect` has a code that cannot be identified.
        """
        self.counts: Counter[str] = Counter()  # language of the adapter, BASE or UNKNOWN -> prompts
        self._adapters = frozenset(config.adapters)
        known = {language for language in config.adapters if language in languages.CODES}
        self._detector = languages.detector(sorted(known | set(config.detect)))

    def of(self, row: Row) -> str | None:
        """The language whose adapter answers a row's `prompt`; None: the model answers without one.

        It is the row's `language`, or what most of the user's text is in.
        """
        language = row.get("language") or self._identified(row)
        adapter = language if language in self._adapters else None
        self.counts[UNKNOWN if language is None else adapter or BASE] += 1
        return adapter

    def _identified(self, row: Row) -> str | None:
        asked = [message["content"] for message in row["prompt"] if message["role"] == "user"]
        return self._detector.identify("\n".join(asked)).language
