"""One module of text per language."""

from data_builders.synthesis.languages import (
    chinese,
    english,
    indonesian,
    malay,
    portuguese,
    tagalog,
    thai,
    vietnamese,
)
from data_builders.synthesis.locales import Language
from data_builders.synthesis.wording import Wording

WORDINGS: dict[Language, Wording] = {
    "en": english.WORDING,
    "zh": chinese.WORDING,
    "id": indonesian.WORDING,
    "ms": malay.WORDING,
    "th": thai.WORDING,
    "vi": vietnamese.WORDING,
    "tl": tagalog.WORDING,
    "pt": portuguese.WORDING,
}
