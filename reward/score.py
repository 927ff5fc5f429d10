"""Score answers with a reward model.

    python -m reward.score --config configs/reward/score.yaml

Reads rows with `prompt` and `completion` (a text) or `completions` (texts); writes the same rows with `score` or
`scores` to `output_dir/rows.jsonl`. A chunk of rows that was scored is not scored again when the job resumes.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from alignment import chat, job, models
from alignment.config import ModelConfig
from alignment.errors import UserError, did_you_mean
from alignment.progress import track
from alignment.rows import Row, first_rows, local_inputs, read_rows, write_rows
from reward import shared_prompt
from reward.config import ScoreConfig
from reward.model import load_trained_reward_model
from reward.shared_prompt import Group

Ids = list[int]

# How far a packed score may be from the same answer's alone: rounding, and nothing else.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Scorer:
    """A reward model at work: token ids in, scores out, many answers to a forward pass."""

    def __init__(self, folder: Path, batch_tokens: int) -> None:
        shared_prompt.register()
        self.folder = folder
        self.batch_tokens = batch_tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # On a CPU, transformers' plain loop over experts is faster than its grouped products.
        experts = {} if self.device.type == "cuda" else {"experts_implementation": "eager"}
        self.model = load_trained_reward_model(folder, **experts)
        nn.Module.to(self.model, self.device)
        self._probe()
        self.model.set_attn_implementation(shared_prompt.SHARED_PROMPT)

    def score(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[float]:
        """The score of each completion after its prompt, in order.

        Equal prompts are run once for many answers, and equal answers to one prompt once.

        Raises:
            UserError: a prompt with its completion is longer than the model's context.
        """
        answers = [(tuple(p), tuple(c)) for p, c in zip(prompts, completions, strict=True)]
        distinct = list(dict.fromkeys(answers))
        batches = plan_batches(
            [list(p) for p, _ in distinct], [list(c) for _, c in distinct], self.batch_tokens, self._context()
        )
        scores = np.empty(len(distinct))
        for groups, members in track(batches, len(batches), f"score with {self.folder}"):
            scores[members] = self._forward(shared_prompt.pack(groups, self.device))
        found = dict(zip(distinct, scores.tolist(), strict=True))
        return [found[answer] for answer in answers]

    @torch.inference_mode()
    def _forward(self, inputs: dict[str, Any]) -> list[float]:
        return list(self.model(**inputs, use_cache=False).logits[:, 0].tolist())

    def _context(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 62))

    def _probe(self) -> None:
        """Refuse a model whose attention is not the plain one (sliding windows, sinks)."""
        width = min(24, self._context() // 2)
        ids = torch.randint(self.model.config.get_text_config().vocab_size, (4, width), generator=torch.manual_seed(0))
        prompt, *answers = ids.tolist()
        alone = [self._forward({"input_ids": torch.tensor([prompt + a], device=self.device)})[0] for a in answers]
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(shared_prompt.SHARED_PROMPT)
        packed = self._forward(shared_prompt.pack([Group(prompt, answers)], self.device))
        self.model.set_attn_implementation(before)
        worst = max(abs(a - b) / (1 + abs(a)) for a, b in zip(alone, packed, strict=True))
        if not worst < TOLERANCES[self.model.dtype]:
            raise UserError(
                f"{self.folder}: answers scored together differ by {worst:.1g} from alone; the attention of "
                f"{type(self.model).__name__} is not supported"
            )


def plan_batches(
    prompts: Sequence[Ids], completions: Sequence[Ids], batch_tokens: int, context: int
) -> list[tuple[list[Group], list[int]]]:
    """Batches of groups of at most `batch_tokens` tokens each (or a single longer answer), and whose answers they hold.

    Answers whose prompt no other shares are grouped with each other, behind no prompt. Within a group answers of like
    length stand side by side, since attention pads them to the longest.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        length = len(prompt) + len(completion)
        if not 0 < length <= context:
            raise UserError(f"an answer has {length} tokens with its prompt; the reward model reads 1 to {context}")
        by_prompt.setdefault(tuple(prompt) if completion else (), []).append(i)
    alone = [members.pop() for key, members in by_prompt.items() if key and len(members) == 1]
    alone += by_prompt.pop((), [])
    slices = list(_slices([], alone, [prompts[i] + completions[i] for i in alone], batch_tokens))
    for key, members in by_prompt.items():
        slices += _slices(list(key), members, [completions[i] for i in members], batch_tokens)
    return _batched(slices, batch_tokens)


def _slices(
    prompt: Ids, members: Sequence[int], answers: Sequence[Ids], batch_tokens: int
) -> Iterator[tuple[Group, list[int]]]:
    """Cut one prompt's answers, shortest first, where they would exceed the budget, padded."""
    order = sorted(range(len(members)), key=lambda i: len(answers[i]))
    cut: list[int] = []
    for i in order:
        if cut and len(prompt) + (len(cut) + 1) * len(answers[i]) > batch_tokens:
            yield Group(prompt, [answers[j] for j in cut]), [members[j] for j in cut]
            cut = []
        cut.append(i)
    if cut:
        yield Group(prompt, [answers[j] for j in cut]), [members[j] for j in cut]


def _batched(slices: Sequence[tuple[Group, list[int]]], batch_tokens: int) -> list[tuple[list[Group], list[int]]]:
    batches: list[tuple[list[Group], list[int]]] = []
    room = 0
    for group, members in slices:
        if not batches or group.tokens > room:
            batches.append(([], []))
            room = batch_tokens
        batches[-1][0].append(group)
        batches[-1][1].extend(members)
        room -= group.tokens
    return batches


def run(config: ScoreConfig) -> None:
    with job.Job.open("reward.score", config, local_inputs(config.rows, config.model)) as this:
        if this.done:
            return
        tokenizer = models.load_tokenizer(ModelConfig(path=config.model))
        scorer = Scorer(Path(config.model), config.batch_tokens)
        chunks: list[Path] = []
        rows = read_rows(config.rows)
        while chunk := list(islice(rows, config.chunk_rows)):
            path = this.dir / "chunks" / f"{len(chunks):06d}.jsonl"
            if not path.exists():
                write_rows(path, score_rows(chunk, scorer, tokenizer))
            chunks.append(path)
        scored = (row for path in chunks for row in read_rows(path))
        count = write_rows(this.dir / "rows.jsonl", scored)
        this.finish({"rows": count, **_summary(this.dir / "rows.jsonl")})


def score_rows(rows: Sequence[Row], scorer: Scorer, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows with `score` (of `completion`) or `scores` (of `completions`)."""
    prompts, answers = [], []
    for number, row in enumerate(rows):
        prompt = chat.render_prompt(tokenizer, row["prompt"])
        texts = completions_of(row, f"row {row.get('id', number)}")
        prompts += [prompt] * len(texts)
        answers += [chat.render_completion(tokenizer, text) for text in texts]
    scores = iter(scorer.score(prompts, answers))
    return [row | _own(row, scores) for row in rows]


def _own(row: Row, scores: Iterator[float]) -> Row:
    if "completions" in row:
        return {"scores": list(islice(scores, len(row["completions"])))}
    return {"score": next(scores)}


def completions_of(row: Row, name: str) -> list[str]:
    """The texts to score in a row.

    Raises:
        UserError: neither or both of `completion` and `completions`, or something that is no text.
    """
    given = [key for key in ("completion", "completions") if key in row]
    if len(given) != 1:
        hint = did_you_mean("completion", row) if not given else ""
        raise UserError(f"{name}: expected one of 'completion' (a text) and 'completions' (texts){hint}")
    texts = row["completions"] if given == ["completions"] else [row["completion"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: {given[0]!r} must be {'a list of texts' if given == ['completions'] else 'a text'}")
    return texts


def _summary(path: Path) -> dict[str, float]:
    scores = [s for row in read_rows(path) for s in (row["scores"] if "scores" in row else [row["score"]])]
    return {"completions": len(scores), "score.mean": float(np.mean(scores)), "score.std": float(np.std(scores))}


def plan(config: ScoreConfig) -> list[str]:
    models.check_model_folder(Path(config.model))
    for number, row in enumerate(first_rows(config.rows, "prompt"), start=1):
        completions_of(row, f"{config.rows} row {number}")
    return [f"score {config.rows} with {config.model}, {config.batch_tokens} tokens a pass"]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(ScoreConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
