"""vLLM servers that other machines run (alignment.rollout.serve): the same samples as the engine in this process.

A server draws each token as the engine does (alignment.rollout.draw), so a sample is the same wherever it is drawn,
but for rounding. No server is believed: before it takes requests, and again whenever it comes back, it has to show that
it draws from the seeds it is given and that it serves the weights of the model folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat

from alignment.closing import Closing
from alignment.config import EngineConfig, SamplingConfig
from alignment.errors import UserError
from alignment.fingerprint import weights_hash
from alignment.models import check_model_folder
from alignment.rollout.pool import Fault, Pool, Server, read_as
from alignment.rollout.proof import GATE, Proof, check_shape, mean_gap, mismatch, probe, reference_logprobs, shape_of
from alignment.rollout.samples import FinishReason, Sample
from alignment.rollout.seeds import arguments, uniform

COMPLETIONS = "/v1/completions"
# At this temperature every token is as likely as any other: what is drawn shows the random numbers.
FLAT = SamplingConfig(temperature=1e9, max_tokens=8)
FLAT_SEED = (1 << 63) - 1  # the greatest there is: a server that reads seeds as floats draws others
SERVE = "start it by: python -m alignment.rollout.serve"


class _Logprobs(BaseModel):
    token_logprobs: list[FiniteFloat]


class _Choice(BaseModel):
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: _Logprobs


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1, max_length=1)


class _Logprob(BaseModel):
    logprob: FiniteFloat


class _Scored(BaseModel):
    prompt_logprobs: list[dict[int, _Logprob] | None]


class _Scores(BaseModel):
    choices: list[_Scored] = Field(min_length=1, max_length=1)


class _Model(BaseModel):
    id: str
    max_model_len: int


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class _Success(BaseModel):
    success: Literal[True]


class EndpointEngine(Closing):
    """Samples of a model folder from the servers in `config.endpoints`. Use as a context manager, or `close()` it."""

    def __init__(
        self,
        model: Path,
        config: EngineConfig,
        *,
        dtype: str = "float32",
        key: str | None = None,
        reload: bool = False,
    ) -> None:
        """The servers serve `model`, in `dtype`, or with `reload` any of its shape and load it now.

        They ask for `key` (default: as `config.requests` says).

        Raises:
            UserError: a server serves other weights, does not draw from seeds, or takes shorter prompts than
                `max_model_len`; or none answers.
        """
        check_model_folder(model)
        self.weights = weights_hash(model)
        self.max_model_len = config.max_model_len
        self.settings: dict[str, str | int | float] = {
            "engine": "vllm servers",
            "sampler": "inverse transform",
            "dtype": dtype,
            "max_model_len": config.max_model_len,
        }
        self._folder, self._dtype = model, dtype
        # what the servers were told to load since they started
        self._loaded: Path | None = model.resolve() if reload else None
        self._shape = shape_of(model)
        self._probe = probe(model, config.max_model_len)
        [self._reference] = reference_logprobs(model, [self._probe], dtype)
        self._pool = Pool(config.endpoints, config.requests, self._examine, key)
        self._pool.open()

    @property
    def faults(self) -> Mapping[str, int]:
        """How often what went wrong, by kind and address, such as `429 http://host:8000`."""
        return self._pool.faults

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        stop: Sequence[int],
    ) -> list[list[Sample]]:
        """For each prompt (token ids) a sample of each of its seeds, in the order of the prompts.

        Raises:
            UserError: a request failed too often, or no server is left.
        """
        bodies = [
            _drawn(prompt, seed, sampling, stop) for prompt, own in zip(prompts, seeds, strict=True) for seed in own
        ]
        samples = iter(self._pool.map(bodies, COMPLETIONS, lambda answer: self._sample(answer, sampling, stop)))
        return [[next(samples) for _ in own] for own in seeds]

    def load_weights(self, folder: Path) -> Proof:
        """Have every server replace its weights by those of `folder`, and prove that they are in use.

        The servers see the folder under the same path. One that is down loads it when it comes back. Between the
        first server's change and the last one's nothing may be sampled.

        Raises:
            UserError: no such model, one of another shape, a server that cannot load or does not serve the weights.
        """
        check_model_folder(folder)
        check_shape(self._shape, shape_of(folder), folder)
        [reference] = reference_logprobs(folder, [self._probe], self._dtype)
        former = self._reference, self.weights
        self._reference, self.weights = reference, weights_hash(folder)
        self._folder = self._loaded = folder.resolve()
        changed = self.weights != former[1]
        gap = self._pool.run(self._change(changed))
        return Proof(gap, mean_gap(former[0], reference) if changed else None)

    def close(self) -> None:
        """Close the connections. Closing twice does nothing."""
        self._pool.close()

    def _sample(self, answer: Any, sampling: SamplingConfig, stop: Sequence[int]) -> Sample:
        [choice] = read_as(_Completion, answer).choices
        ids, logprobs = choice.token_ids, choice.logprobs.token_logprobs
        if not ids or len(ids) != len(logprobs):
            raise Fault("garbage", f"{len(ids)} tokens with {len(logprobs)} log-probabilities")
        if not all(0 <= token < self._shape["vocab_size"] for token in ids):
            raise Fault("garbage", "a token that is not in the vocabulary")
        if choice.finish_reason == "length" and len(ids) != sampling.max_tokens:
            raise Fault("garbage", f"cut off at {len(ids)} tokens, not at {sampling.max_tokens}")
        if choice.finish_reason == "stop" and ids[-1] not in stop:
            raise Fault("garbage", f"stopped at token {ids[-1]}, which does not end an answer")
        return Sample(ids, choice.finish_reason, sum(logprobs))

    # What a server has to show

    async def _examine(self, server: Server) -> None:
        await self._pool.get(server, "/health")
        [served, *_] = read_as(_Models, await self._pool.get(server, "/v1/models")).data
        if served.max_model_len < self.max_model_len:
            raise UserError(
                f"{server.address}: takes {served.max_model_len} tokens, expected engine.max_model_len "
                f"{self.max_model_len}; {SERVE} --max-model-len {self.max_model_len}"
            )
        server.model = served.id
        await self._check_draw(server)
        if self._loaded is not None:
            await self._load(server)
        self._gap(server, await self._logprobs(server))

    async def _check_draw(self, server: Server) -> None:
        body = {**_drawn(self._probe[:4], FLAT_SEED, FLAT, []), "model": server.model}
        sample = self._sample(await self._pool.post(server, COMPLETIONS, body), FLAT, [])
        places = np.arange(FLAT.max_tokens, dtype=np.uint64)
        vocabulary = self._shape["vocab_size"]
        expected = np.floor(uniform(np.full(len(places), FLAT_SEED, dtype=np.uint64), places) * vocabulary)
        if np.abs(expected - sample.token_ids).max() > 1 + vocabulary * 1e-3:  # rounding, at a temperature so high
            raise UserError(f"{server.address}: does not draw from the seeds it is given; {SERVE} {self._folder}")
        if sample.logprob == 0:
            raise UserError(f"{server.address}: gives log-probabilities of its draw, not of the model; {SERVE}")

    def _gap(self, server: Server, logprobs: Sequence[float]) -> float:
        gap = mean_gap(logprobs, self._reference)
        if not gap <= GATE[self._dtype]:
            raise UserError(f"{server.address}: {mismatch(str(self._folder), gap, self._dtype)}")
        return gap

    async def _logprobs(self, server: Server) -> list[float]:
        """The server's log-probability of each token of the probe but the first."""
        body = {
            "model": server.model,
            "prompt": self._probe,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        [scored] = read_as(_Scores, await self._pool.post(server, COMPLETIONS, body)).choices
        try:
            pairs = zip(scored.prompt_logprobs[1:], self._probe[1:], strict=True)
            return [position[token].logprob for position, token in pairs if position is not None]
        except (KeyError, ValueError):
            raise Fault("garbage", "prompt_logprobs without the prompt's tokens") from None

    # New weights

    async def _change(self, changed: bool) -> float:
        """Load `_loaded` everywhere. Returns the greatest of the servers' gaps to the reference."""
        gaps = []
        for server in filter(lambda server: server.up, self._pool.servers):
            try:
                before = await self._logprobs(server)
                await self._load(server)
                now = await self._logprobs(server)
            except Fault as fault:
                raise UserError(f"{server.address}: cannot load {self._folder}: {fault}") from None
            if changed and now == before:
                raise UserError(f"{server.address}: {self._folder}: log-probabilities did not change with the weights")
            gaps.append(self._gap(server, now))
        if not gaps:
            raise UserError(f"{self._folder}: no server is up to load it")
        return max(gaps)

    async def _load(self, server: Server) -> None:
        try:
            request = {"method": "load_folder", "args": [str(self._loaded)]}
            await self._pool.post(server, "/collective_rpc", request)
            read_as(_Success, await self._pool.post(server, "/reset_prefix_cache", {}))
        except UserError as error:  # 404: the server was not started with what it takes
            raise UserError(f"{error}\nit cannot load new weights; {SERVE} MODEL --reloadable") from None


def _drawn(prompt: Sequence[int], seed: int, sampling: SamplingConfig, stop: Sequence[int]) -> dict[str, Any]:
    """The request for one sample: greedy, for the draw leaves one token to choose."""
    return {
        "prompt": list(prompt),
        "max_tokens": sampling.max_tokens,
        "temperature": 0.0,
        "stop_token_ids": list(stop),
        "ignore_eos": True,  # the model's own eos token counts only where it is among `stop`
        # The model folder's generation_config.json would set these:
        "top_k": 0, "top_p": 1.0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "logprobs": 0,  # the chosen token's only
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # needs no tokenizer
        "vllm_xargs": arguments(sampling, seed),
    }  # fmt: skip
