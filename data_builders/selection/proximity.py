"""How near two languages are by descent, and rows by language where the nearest come first: a baseline.

LangRank (Lin et al. 2019, Choosing Transfer Languages, arXiv 1905.12688) and its like draw auxiliary data by language.
Proximity here is the cosine of the sets of groups that two languages belong to, the language itself among them: what
URIEL's family vectors give (Littell et al. 2017, URIEL and lang2vec). The groups are those of Glottolog 5, some levels
left out. Descent alone: that Thai, Vietnamese and Chinese are typologically alike does not show.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from alignment.apportion import apportion

# Each group of languages by its path from the family down.
GROUPS = {
    "Austronesian/Malayo-Polynesian/Malayic": ("id", "ms"),
    "Austronesian/Malayo-Polynesian/Javanese": ("jv",),
    "Austronesian/Malayo-Polynesian/Sundanese": ("su",),
    "Austronesian/Malayo-Polynesian/Philippine": ("tl", "ceb"),
    "Austronesian/Malayo-Polynesian/Oceanic": ("mi",),
    "Austroasiatic/Vietic": ("vi",),
    "Austroasiatic/Khmeric": ("km",),
    "Tai-Kadai/Kam-Tai/Southwestern": ("th", "lo"),
    "Sino-Tibetan/Sinitic": ("zh", "yue"),
    "Sino-Tibetan/Burmo-Qiangic": ("my",),
    "Indo-European/Germanic/West": ("en", "de", "nl", "af"),
    "Indo-European/Germanic/North": ("da", "nb", "nn", "sv", "is"),
    "Indo-European/Italic/Ibero-Romance": ("pt", "es", "gl"),
    "Indo-European/Italic/Gallo-Romance": ("fr", "ca", "it"),
    "Indo-European/Italic/Eastern": ("ro",),
    "Indo-European/Balto-Slavic/East": ("ru", "uk", "be"),
    "Indo-European/Balto-Slavic/West": ("pl", "cs", "sk"),
    "Indo-European/Balto-Slavic/South": ("bg", "hr", "sr", "sl", "mk"),
    "Indo-European/Balto-Slavic/Baltic": ("lt", "lv"),
    "Indo-European/Indo-Iranian/Indo-Aryan": ("hi", "ur", "bn", "gu", "mr", "pa", "ne", "si"),
    "Indo-European/Indo-Iranian/Iranian": ("fa", "ps"),
    "Indo-European/Graeco-Phrygian": ("el",),
    "Afro-Asiatic/Semitic": ("ar", "he", "am"),
    "Dravidian/South": ("ta", "te", "kn", "ml"),
    "Turkic/Oghuz": ("tr", "az"),
    "Turkic/Kipchak": ("kk", "ky", "tt"),
    "Japonic": ("ja",),
    "Koreanic": ("ko",),
    "Uralic/Finnic": ("fi", "et"),
    "Uralic/Hungarian": ("hu",),
    "Basque": ("eu",),
    "Atlantic-Congo/Bantu": ("sw", "zu", "xh"),
    "Atlantic-Congo/Yoruboid": ("yo",),
}
PATHS = {language: tuple(path.split("/")) for path, languages in GROUPS.items() for language in languages}


def proximity(one: str, other: str) -> float:
    """1 for one language, 0 for languages of different families or not in the table, else between them."""
    if one == other:
        return 1.0
    if one not in PATHS or other not in PATHS:
        return 0.0
    shared = sum(a == b for a, b in zip(PATHS[one], PATHS[other], strict=False))
    return shared / math.sqrt((len(PATHS[one]) + 1) * (len(PATHS[other]) + 1))


def nearest_first(target: Mapping[str, int], pool: Mapping[str, int], budget: int) -> dict[str, int]:
    """Rows to draw of each language of the pool: each target language has its share of the budget, nearest first.

    Languages as near give in proportion to their rows. Of two target languages that are as near to the same rows the
    larger one has them.
    """
    wanted_of, left = sorted(target, key=lambda language: (-target[language], language)), dict(pool)
    rows_of = np.array([target[language] for language in wanted_of], np.float64)
    need = dict(zip(wanted_of, apportion(rows_of, budget, np.full(len(target), budget)).tolist(), strict=True))
    for level in sorted({proximity(t, p) for t in target for p in pool}, reverse=True):
        for language in wanted_of:
            near = [p for p in left if proximity(language, p) == level]
            for other, rows in zip(near, _in_proportion([left[p] for p in near], need[language]), strict=True):
                left[other] -= rows
                need[language] -= rows
    return {language: rows - left[language] for language, rows in pool.items()}


def _in_proportion(rows: Sequence[int], wanted: int) -> list[int]:
    counts: list[int] = apportion(rows, wanted, rows).tolist()
    return counts
