"""Train a small byte-level BPE tokenizer from rows.

    python -m alignment.tokenizer --config configs/data/demo-tokenizer.yaml

Writes `output_dir/tokenizer`, a folder that AutoTokenizer loads. Each digit is a token of its own, so that numbers are
read digit by digit; round thousands, which rupiah and dong prices end in, are one: 45.000 is `4` `5` `.000`.
"""

from collections.abc import Iterator, Sequence

from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignment import chat, job
from alignment.config import JobConfig
from alignment.rows import first_rows, local_inputs, read_rows

SPECIAL_TOKENS = [AddedToken(t, special=True, normalized=False) for t in (chat.PAD, chat.TURN_START, chat.TURN_END)]
# The marks of thinking are text that an answer shows, so decoding keeps them. The trainer would make them special.
THINKING_TOKENS = [AddedToken(token, special=False, normalized=False) for token in (chat.THINK_START, chat.THINK_END)]

ROUND_THOUSANDS = [AddedToken(text, normalized=False) for text in (".000", ",000")]


class TokenizerConfig(JobConfig):
    """Train a tokenizer."""

    rows: list[str] = Field(min_length=1, description="files, folders or hub ids of rows with `messages`")
    vocab_size: int = Field(2048, ge=300, description="special tokens and bytes among them")
    max_length: int = Field(1024, gt=0, description="the model's context, in tokens")
    across_words: bool = Field(
        False, description="let a token hold several words: fewer tokens of text made to a pattern"
    )


def run(config: TokenizerConfig) -> None:
    with job.Job.open("alignment.tokenizer", config, local_inputs(*config.rows)) as this:
        if this.done:
            return
        tokenizer = train(texts(config.rows), config.vocab_size, config.max_length, config.across_words)
        tokenizer.save_pretrained(this.dir / "tokenizer")
        this.finish({"vocab_size": len(tokenizer), **compression(tokenizer, texts(config.rows))})


def plan(config: TokenizerConfig) -> list[str]:
    for source in config.rows:
        first_rows(source, "messages")
    return [f"train a byte-level BPE of {config.vocab_size} tokens on {', '.join(config.rows)}"]


def texts(sources: Sequence[str]) -> Iterator[str]:
    return (
        message["content"] for source in sources for row in read_rows(source, "messages") for message in row["messages"]
    )


def train(
    lines: Iterator[str], vocab_size: int, max_length: int, across_words: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's special tokens, digits apart, and our chat template.

    `across_words` lets a token hold several words, up to the next digit, as the second stage of SuperBPE does
    (Liu et al. 2025, arXiv 2503.13423).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ROUND_THOUSANDS) - len(THINKING_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_tokens(ROUND_THOUSANDS)
    tokenizer.add_tokens(THINKING_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=chat.TURN_END, pad_token=chat.PAD, model_max_length=max_length
    )
    fast.chat_template = chat.CHATML
    return fast


def compression(tokenizer: PreTrainedTokenizerFast, lines: Iterator[str]) -> dict[str, float]:
    """Characters per token over the training text."""
    sample = [line for line, _ in zip(lines, range(2000), strict=False)]
    tokens = sum(len(ids) for ids in tokenizer(sample)["input_ids"])
    return {"characters_per_token": round(sum(map(len, sample)) / tokens, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(TokenizerConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
