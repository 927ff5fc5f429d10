"""The engine of online training: one for all rounds, with the weights asked for, and believed only once it shows them.

Sampling and training take turns. On CPU, on servers and on Ray the engine stays. In this process on a GPU it is closed
before a training begins, which takes the same devices, and started with the new weights after it. To sample and train
on devices of their own, serve the policy elsewhere and name it in `engine.endpoints`.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from alignment import chat, models
from alignment.closing import Closing
from alignment.config import ModelConfig
from alignment.errors import UserError
from alignment.fingerprint import weights_hash
from alignment.rollout import open_engine
from alignment.rollout.proof import GATE
from alignment.rollout.seeds import sample_seed
from alignment.rows import Row
from dpo.config import OnlineConfig
from dpo.likelihood import Answer, gap_per_token

PROBES = 8  # prompts that a policy answers before it is believed


class Policies(Closing):
    """The engine, started when it is first needed, with the weights that were last asked for.

    `gap` is what the last load showed: mean |difference| of log-probabilities a token to transformers, in nats.
    """

    def __init__(self, config: OnlineConfig) -> None:
        self.config = config
        self.engine: Any = None
        self.gap = 0.0

    def engine_with(self, model: Path, prompts: Sequence[Row]) -> Any:
        """The engine with the weights of `model`. Where it held others it first answers some of `prompts`.

        Raises:
            RuntimeError: its log-probabilities of these answers are not the model's: it serves other weights.
        """
        if self.engine is None:
            self.engine = self._open(model)
        elif self.engine.weights != weights_hash(model):
            self.engine.load_weights(model)
        else:
            return self.engine
        self.gap = self._gap(model, prompts)
        limit = self.config.round.logprob_gate or GATE[self.config.dtype]
        if not self.gap <= limit:
            raise RuntimeError(
                f"{model}: log-probabilities of the engine's answers differ from transformers' by {self.gap:.2g} a "
                f"token, expected at most {limit:.2g} (round.logprob_gate): the engine does not serve these weights"
            )
        return self.engine

    def release(self) -> None:
        """Give the devices to the training that follows, where it takes the same."""
        elsewhere = self.config.engine.endpoints or self.config.engine.ray_replicas
        if torch.cuda.is_available() and not elsewhere:
            self.close()

    def close(self) -> None:
        """Closing twice does nothing."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None

    def _open(self, model: Path) -> Any:
        if not self.config.engine.endpoints:
            return open_engine(model, self.config.engine, self.config.dtype)
        from alignment.rollout.endpoints import EndpointEngine

        # Servers outlive a run that was killed: they may still have the weights of another round.
        return EndpointEngine(model, self.config.engine, dtype=self.config.dtype, reload=True)

    def _gap(self, model: Path, prompts: Sequence[Row]) -> float:
        tokenizer = models.load_tokenizer(ModelConfig(path=str(model)))
        room = self.config.engine.max_model_len - self.config.sampling.max_tokens
        rendered = ((row["id"], chat.render_prompt(tokenizer, row["prompt"])) for row in prompts)
        probes = dict(islice(((name, ids) for name, ids in rendered if len(ids) <= room), PROBES))
        if not probes:
            raise UserError(
                f"no prompt fits: all have more than {room} tokens (engine.max_model_len - sampling.max_tokens)"
            )
        seeds = [[sample_seed(self.config.seed, f"gate/{name}", 0)] for name in probes]
        stop = [chat.stop_token_id(tokenizer)]
        samples = self.engine.generate(list(probes.values()), seeds, self.config.sampling, stop)
        answers = [Answer(ids, s.token_ids, s.logprob) for ids, [s] in zip(probes.values(), samples, strict=True)]
        return gap_per_token(answers, model, self.config.dtype)
