"""Render and tokenize the rows of a config into the cache, once, on the CPU.

    python -m sft.prepare --config configs/sft/demo.yaml
    python -m sft.prepare --config configs/sft/demo.yaml packing.capacity=1024 prepare.workers=8

Takes the config of sft.train, which does the same where the cache is not filled yet. Prints what each source holds, and
what the mixture and the capacity will drop. Opens no `output_dir`.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignment import job, models
from alignment.rows import first_rows
from sft.cache import REJECTED, TokenizedRows, cached_source, prepare_source, short
from sft.config import SFTConfig
from sft.mixture import Mixture, mix


def prepare(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> TokenizedRows:
    """The tokenized rows of all sources, mapped into memory. Every rank calls it, before any process group exists."""
    return TokenizedRows([prepare_source(source.rows, tokenizer, config.prepare) for source in config.sources])


def cached_rows(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> TokenizedRows | None:
    """As `prepare`, but None where a source is not in the cache."""
    sources = [cached_source(source.rows, tokenizer, config.prepare) for source in config.sources]
    return None if None in sources else TokenizedRows([source for source in sources if source is not None])


def check_sources(config: SFTConfig) -> list[str]:
    """Check that the sources exist and their first rows, which is quick, and say what will be prepared."""
    for source in config.sources:
        first_rows(source.rows, "messages")
    return [f"rows: {', '.join(source.rows for source in config.sources)}", f"cache: {config.prepare.cache}"]


def describe_rows(rows: TokenizedRows) -> list[str]:
    """For each source its lengths, the share of its tokens that is trained, and what was rejected."""
    lines = []
    for number, name in enumerate(rows.sources):
        part = slice(rows.bounds[number], rows.bounds[number + 1])
        lengths, reasons = rows.lengths[part], rows.reasons[part]
        middle, high = np.percentile(lengths, [50, 95])
        share = rows.trained_tokens[part].sum(dtype=np.int64) / max(1, lengths.sum(dtype=np.int64))
        counts = {reason: int((reasons == code).sum()) for code, reason in enumerate(REJECTED, start=1)}
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        lines.append(
            f"{name}: {len(lengths):,} rows of {short(lengths.sum(dtype=np.int64))} tokens, {share:.1%} trained; "
            f"lengths: median {middle:.0f}, p95 {high:.0f}, longest {lengths.max()}; rejected: {rejected or 'none'}"
        )
    return lines


def describe_mixture(mixture: Mixture) -> list[str]:
    """For each source its part of an epoch, and what is dropped of all."""
    ledger = mixture.ledger
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items()))
    return [
        *(
            f"mixture: {source['source']}: {source['drawn']:,} of {source['rows']:,} rows drawn; an epoch takes "
            f"{source['epoch_rows']:,} rows of {short(source['epoch_tokens'])} tokens, {source['token_share']:.1%}"
            for source in mixture.sources
        ),
        f"{ledger.rows_out:,} of {ledger.rows_in:,} rows train, {ledger.truncated:,} of them truncated; "
        f"dropped: {dropped or 'none'}",
    ]


def run(config: SFTConfig) -> None:
    rows = prepare(config, models.load_tokenizer(config.model))
    if job.rank() == 0:
        print("\n".join(describe_rows(rows)))
        print("\n".join(describe_mixture(mix(config, rows))))


def plan(config: SFTConfig) -> list[str]:
    models.check_model(config.model)
    return check_sources(config)


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(SFTConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
