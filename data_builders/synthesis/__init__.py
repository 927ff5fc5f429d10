"""Multilingual shopping arithmetic: exact problems, worded in eight languages, with short and thinking answers.

`problems` draws and solves (no language), `languages` words (no arithmetic), `locales` writes numbers, and `generate`
joins them.
"""

from data_builders.synthesis.generate import Split, Task, check_disjoint, generate, split_of
from data_builders.synthesis.locales import LANGUAGES, LOCALES, Language, Locale
from data_builders.synthesis.problems import TEMPLATES, Template

__all__ = [
    "LANGUAGES",
    "LOCALES",
    "TEMPLATES",
    "Language",
    "Locale",
    "Split",
    "Task",
    "Template",
    "check_disjoint",
    "generate",
    "split_of",
]
