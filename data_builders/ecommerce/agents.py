"""Mixture-of-agents (Wang et al. 2024, arXiv 2406.04692), one layer: several models propose, one sums up."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_builders.ecommerce.config import MixtureOfAgentsConfig
from data_builders.ecommerce.drafts import Draft
from data_builders.ecommerce.quality import is_refusal
from data_builders.writers import Messages, Written, write

AGENTS = "mixture of agents"
# The paper's Aggregate-and-Synthesize prompt (table 1).
SYNTHESIZE = """\
You have been provided with a set of responses from various open-source models to the latest user query. Your task is \
to synthesize these responses into a single, high-quality response. It is crucial to critically evaluate the \
information provided in these responses, recognizing that some of it may be biased or incorrect. Your response should \
not simply replicate the given answers but should offer a refined, accurate, and comprehensive reply to the \
instruction. Ensure your response is well-structured, coherent, and adheres to the highest standards of accuracy and \
reliability.

Responses from models:
{responses}"""


def answer(
    drafts: Sequence[Draft], config: MixtureOfAgentsConfig, folder: Path, seed: int
) -> tuple[list[Draft], dict[str, str], Counter[str]]:
    """The drafts, with replies where a model had to write them; id -> why one has none; and the counts by reason.

    A proposal that is cut off, empty or a refusal is no reference; a draft with none is not summed up.
    """
    asked = [draft for draft in drafts if draft.reply is None]
    counts: Counter[str] = Counter(asked=len(asked))
    proposals: dict[str, list[str]] = {draft.id: [] for draft in asked}
    for number, proposer in enumerate(config.proposers):
        questions = {draft.id: question(draft) for draft in asked}
        written = write(proposer, questions, folder / f"proposer_{number + 1}", seed, f"proposer {number + 1}", counts)
        for name, text in written.items():
            reason = _useless(text)
            counts["proposals" if reason is None else f"proposals lost: {reason}"] += 1
            proposals[name] += [] if reason else [text.spoken.text]
    to_sum_up = {draft.id: synthesis(draft, proposals[draft.id]) for draft in asked if proposals[draft.id]}
    found = write(config.aggregator, to_sum_up, folder / "aggregator", seed, "aggregator", counts)
    failed = {draft.id: "no proposal" for draft in asked if not proposals[draft.id]}
    failed |= {name: f"aggregator {text.spoken.fault}" for name, text in found.items() if text.spoken.fault}
    counts["answered"] = len(found) - sum(name in failed for name in found)
    return [_answered(draft, found, failed) for draft in drafts], failed, counts


def question(draft: Draft) -> Messages:
    return [{"role": "user", "content": draft.question}]


def synthesis(draft: Draft, proposals: Sequence[str]) -> Messages:
    """The aggregator's question: the proposals, numbered, stand in the system turn."""
    responses = "\n".join(f"{number}. {text}" for number, text in enumerate(proposals, start=1))
    return [{"role": "system", "content": SYNTHESIZE.format(responses=responses)}, *question(draft)]


def _useless(written: Written) -> str | None:
    spoken = written.spoken
    return spoken.fault or ("refusal" if is_refusal(spoken.text) else None)


def _answered(draft: Draft, found: Mapping[str, Written], failed: Mapping[str, str]) -> Draft:
    if draft.id not in found or draft.id in failed:
        return draft
    return replace(draft, reply=found[draft.id].spoken.text, author=AGENTS)
