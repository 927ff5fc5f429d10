"""Verdicts and reward scores for sampled chunks, kept on disk so that a resumed job judges none a second time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignment import chat, models
from alignment.config import ModelConfig
from alignment.grading import GradedChunk, GradedSample, grade, read_graded, writing
from alignment.rollout.sampling import Chunk
from alignment.verify import Verifier
from reward.scorer import Scorer


class Judge:
    """The math rule and the mean of the reward models, chunk by chunk, below `folder`."""

    def __init__(self, verifier: Verifier, reward_models: Sequence["RewardModel"], folder: Path) -> None:
        self._verifier, self._reward_models, self._folder = verifier, reward_models, folder

    def __call__(self, chunk: Chunk) -> GradedChunk:
        path = self._folder / f"{chunk.name}.parquet"
        if path.exists():
            known = dict(read_graded(path))
            samples = [known.get(prompt["id"]) for prompt in chunk.prompts]
            return GradedChunk(chunk.name, chunk.prompts, samples, chunk.resampled)
        graded = self._scored(grade(chunk, self._verifier))
        with writing(path) as write:
            write(graded.flat)
        return graded

    def _scored(self, chunk: GradedChunk) -> GradedChunk:
        if not self._reward_models or not chunk.flat:
            return chunk
        means = np.mean([model.score(chunk) for model in self._reward_models], axis=0)
        scores = iter(means.tolist())
        samples = [
            None if of_prompt is None else [replace(sample, score=next(scores)) for sample in of_prompt]
            for of_prompt in chunk.samples
        ]
        return replace(chunk, samples=samples)


@contextmanager
def judging(
    reward_models: Sequence[str], batch_tokens: int, policy: PreTrainedTokenizerBase, folder: Path
) -> Iterator[Judge]:
    """A judge with its worker processes and reward models; `policy` is the tokenizer of the samples."""
    with Verifier() as verifier:
        yield Judge(verifier, [RewardModel(Path(model), batch_tokens, policy) for model in reward_models], folder)


class RewardModel:
    """Scores of sampled answers by one reward model: of the sampled tokens, or of their text in its own."""

    def __init__(self, folder: Path, batch_tokens: int, policy: PreTrainedTokenizerBase) -> None:
        self._scorer = Scorer(folder, batch_tokens)
        self._tokenizer = models.load_tokenizer(ModelConfig(path=str(folder)))
        self._reads_tokens = chat.tokenizer_hash(self._tokenizer) == chat.tokenizer_hash(policy)

    def score(self, chunk: GradedChunk) -> list[float]:
        prompts, answers = [], []
        for prompt, samples in zip(chunk.prompts, chunk.samples, strict=True):
            options = chat.template_options(prompt)
            ids = chat.render_prompt(self._tokenizer, prompt["prompt"], **options) if samples else []
            prompts += [ids] * len(samples or ())
            answers += [self._answer(sample) for sample in samples or ()]
        return self._scorer.score(prompts, answers)

    def _answer(self, sample: GradedSample) -> list[int]:
        """The answer's tokens; reward models are trained on whole ones, so a cut-off one ends with a stop token too."""
        if not self._reads_tokens:
            return chat.render_completion(self._tokenizer, sample.completion)
        if sample.finish_reason == "stop":
            return sample.token_ids
        return [*sample.token_ids, chat.stop_token_id(self._tokenizer)]
