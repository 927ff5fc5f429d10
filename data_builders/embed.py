"""Embeddings of rows, made ahead of the jobs that use them, as on a machine with a GPU.

    python -m data_builders.embed --config configs/data/embed.yaml

Fills `embedding.cache` (data_builders.embeddings) and writes no rows. Later jobs with the same `embedding` settings
read the vectors there. A killed run goes on from the last whole shard.
"""

from collections.abc import Sequence

from alignment import job
from alignment.rows import local_inputs
from data_builders.config import EmbedConfig
from data_builders.embeddings import check_embedding, embedded, embedding_inputs
from data_builders.texts import check_texts, texts


def run(config: EmbedConfig) -> None:
    inputs = local_inputs(config.rows, *embedding_inputs(config.embedding))
    with job.Job.open("data_builders.embed", config, inputs) as this:
        if this.done:
            return
        found = embedded(texts(config.rows, config.column, config.turns), config.embedding)
        count, dimensions = found.vectors_ND.shape
        truncated = int(found.truncated_N.sum())
        this.finish({"rows": count, "dimensions": dimensions, "embedding.truncated": truncated})


def plan(config: EmbedConfig) -> list[str]:
    check_texts(config.rows, config.column, config.turns)
    check_embedding(config.embedding)
    return [f"vectors of {config.rows} by {config.embedding.model} ({config.embedding.backend})"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(EmbedConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
