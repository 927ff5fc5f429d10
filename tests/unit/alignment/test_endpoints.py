"""What the engine of servers believes: nothing that is not shown, no answer that is not what was asked for."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from alignment.config import EngineConfig, SamplingConfig
from alignment.errors import UserError
from alignment.rollout import open_engine
from alignment.rollout.endpoints import EndpointEngine
from alignment.rollout.proof import probe, reference_logprobs, shape_of
from alignment.rollout.seeds import uniform
from alignment.rollout.serve import arguments, main

spec = importlib.util.spec_from_file_location("scripted_server", Path(__file__).with_name("scripted_server.py"))
scripted = sys.modules.setdefault("scripted_server", importlib.util.module_from_spec(spec))
spec.loader.exec_module(scripted)

REQUESTS = {"tries": 3, "backoff_seconds": 0.01, "health_seconds": 1, "patience_seconds": 0.2, "timeout_seconds": 5}
SAMPLING = SamplingConfig(n=2, max_tokens=6)
STOP = 1


class Scripted(scripted.ScriptedServer):
    """Answers as a vLLM server of the folder whose tokens follow from the seeds alone; `spoil` changes its samples."""

    def __init__(self, folder: Path) -> None:
        super().__init__(self.complete)
        self.vocabulary = shape_of(folder)["vocab_size"]
        self.probe = probe(folder, 64)
        [self.scores] = reference_logprobs(folder, [self.probe], "float32")
        self.spoil: Callable[[dict[str, Any]], None] = lambda choice: None
        self.draws = True

    def complete(self, path: str, body: Any) -> Any:
        if path != "/v1/completions":
            raise scripted.NotFound
        if "prompt_logprobs" in body:
            pairs = zip(self.probe[1:], self.scores, strict=True)
            return {"choices": [{"prompt_logprobs": [None, *({str(t): {"logprob": s}} for t, s in pairs)]}]}
        seed = body["vllm_xargs"]["draw_seed"] if self.draws else 3
        ids = drawn(seed, body["max_tokens"], self.vocabulary)
        choice = {"token_ids": ids, "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5] * len(ids)}}
        self.spoil(choice)
        return {"choices": [choice] if choice else []}


def drawn(seed: int, count: int, vocabulary: int) -> list[int]:
    numbers = uniform(np.full(count, seed, dtype=np.uint64), np.arange(count, dtype=np.uint64))
    return [int(number * vocabulary) for number in numbers]


@pytest.fixture
def server(tiny_model_folder: Path) -> Iterator[Scripted]:
    server = Scripted(tiny_model_folder)
    yield server
    server.close()


def opened(folder: Path, *servers: Scripted, **changes: Any) -> EndpointEngine:
    addresses = [server.address for server in servers]
    return open_engine(
        folder,
        EngineConfig(**{"max_model_len": 64, "endpoints": addresses, "requests": REQUESTS, **changes}),
        "float32",
    )


def test_a_request_carries_the_seed_and_nothing_of_the_servers_defaults(tiny_model_folder, server):
    seeds = [[5, (1 << 63) - 1], [7, 8]]
    with opened(tiny_model_folder, server) as engine:
        server.posts.clear()
        samples = engine.generate([[2, 3], [4]], seeds, SAMPLING, [STOP])
    assert [[s.token_ids for s in of] for of in samples] == [
        [drawn(seed, 6, server.vocabulary) for seed in own] for own in seeds
    ]
    assert {(s.finish_reason, s.logprob) for of in samples for s in of} == {("length", -3.0)}
    body = next(body for _, body in server.posts if body["vllm_xargs"]["draw_seed"] == 7)
    assert (body["prompt"], body["model"], body["temperature"], body["ignore_eos"]) == ([4], "m", 0.0, True)
    assert (body["stop_token_ids"], body["top_k"], body["repetition_penalty"]) == ([STOP], 0, 1.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda choice: choice.clear(),
        lambda choice: choice.pop("token_ids"),
        lambda choice: choice.pop("logprobs"),
        lambda choice: choice.update(finish_reason="abort"),
        lambda choice: choice["token_ids"].append(10**6),
        lambda choice: choice["token_ids"].__setitem__(2, 10**6),
        lambda choice: choice["token_ids"].__setitem__(2, -1),
        lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, float("nan")),
        lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, None),
        lambda choice: (choice["token_ids"].pop(), choice["logprobs"]["token_logprobs"].pop()),
        lambda choice: choice.update(finish_reason="stop", token_ids=[5] * 6),
        lambda choice: choice.update(token_ids=[], logprobs={"token_logprobs": []}),
    ],
)
def test_an_answer_that_was_not_asked_for_is_garbage(tiny_model_folder, server, spoil):
    with opened(tiny_model_folder, server) as engine:
        spoils = [spoil]
        server.spoil = lambda choice: spoils and spoils.pop()(choice)
        [[sample]] = engine.generate([[2, 3]], [[5]], SAMPLING, [STOP])
        assert sample.token_ids == drawn(5, 6, server.vocabulary)
        assert engine.faults == {f"garbage {server.address}": 1}

        server.spoil = spoil
        with pytest.raises(UserError, match=rf"{server.address}: no answer to a request in 3 tries.*garbage"):
            engine.generate([[2, 3]], [[5]], SAMPLING, [STOP])
        assert engine.faults == {f"garbage {server.address}": 4}


def test_an_answer_may_stop_where_it_was_told_to(tiny_model_folder, server):
    with opened(tiny_model_folder, server) as engine:
        server.spoil = lambda choice: choice.update(
            finish_reason="stop", token_ids=[9, STOP], logprobs={"token_logprobs": [-1, -0.25]}
        )
        [[sample]] = engine.generate([[2, 3]], [[5]], SAMPLING, [STOP])
    assert vars(sample) == {"token_ids": [9, STOP], "finish_reason": "stop", "logprob": -1.25}


def test_a_server_that_cannot_show_what_it_has_to_is_refused_by_address(tiny_model_folder, server):
    sound = Scripted(tiny_model_folder)

    def refusal(**changes: Any) -> str:
        with pytest.raises(UserError, match=server.address) as caught:
            opened(tiny_model_folder, sound, server, **changes)
        assert sound.address not in str(caught.value)
        return str(caught.value)

    try:
        opened(tiny_model_folder, sound, server).close()
        server.scores = [score - 1e-3 for score in server.scores]
        assert "differ by 0.001 on average" in refusal()
        server.scores = sound.scores
        server.draws = False
        assert "does not draw from the seeds" in refusal() and "python -m alignment.rollout.serve" in refusal()
        server.draws = True
        server.spoil = lambda choice: choice.update(logprobs={"token_logprobs": [0.0] * 8})
        assert "not of the model" in refusal()
        server.spoil = lambda choice: None
        server.models = {"data": [{"id": "m", "max_model_len": 63}]}
        assert "takes 63 tokens, expected engine.max_model_len 64" in refusal()
    finally:
        sound.close()


def test_weights_that_a_server_cannot_load_are_refused_with_the_command(tiny_model_folder, server):
    refused = pytest.raises(UserError, match=f"{server.address}/collective_rpc: 404")
    with opened(tiny_model_folder, server) as engine, refused as caught:
        engine.load_weights(tiny_model_folder)
    assert "--reloadable" in str(caught.value)


def test_servers_with_other_weights_load_what_a_resumed_run_opens_them_with(tiny_model_folder, server):
    """As a killed run leaves them; without `reload` they are refused."""
    right, server.scores = server.scores, [score - 1 for score in server.scores]
    with pytest.raises(UserError, match="differ by 1 on average"):
        opened(tiny_model_folder, server)
    asked = []

    def answer(path: str, body: Any) -> Any:
        if path not in ("/collective_rpc", "/reset_prefix_cache"):
            return server.complete(path, body)
        asked.append(body)
        server.scores = right
        return {"success": True}

    server.answer = answer
    config = EngineConfig(max_model_len=64, endpoints=[server.address], requests=REQUESTS)
    EndpointEngine(tiny_model_folder, config, reload=True).close()
    assert asked == [{"method": "load_folder", "args": [str(tiny_model_folder.resolve())]}, {}]


def test_the_place_of_the_samples_does_not_depend_on_the_addresses(tiny_model_folder, server):
    other = Scripted(tiny_model_folder)
    with opened(tiny_model_folder, server) as one, opened(tiny_model_folder, other) as two:
        assert (one.settings, one.weights) == (two.settings, two.weights)
    other.close()


@pytest.mark.parametrize(
    ("endpoints", "message"),
    [(["host:8000"], "'host:8000' is not an address"), (["http://a:1", "http://a:1/v1/"], "given twice")],
)
def test_addresses_are_checked(endpoints, message):
    with pytest.raises(ValidationError, match=message):
        EngineConfig(endpoints=endpoints)


def test_an_address_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="keys come from the environment") as caught:
        EngineConfig(endpoints=["http://me:secret@host:8000"])
    assert "secret" not in str(caught.value)


def test_the_serving_command(capsys):
    options = arguments("M", ["--port=1", "--reloadable", "--generation-config=auto"], on_cpu=False)
    assert options[:3] == ["--model", "M", "--logits-processors=alignment.rollout.draw:SeededDraw"]
    assert "--worker-extension-cls=alignment.rollout.reload.FolderWeights" in options and "--reloadable" not in options
    assert options.index("--generation-config=auto") > options.index("--generation-config=vllm")
    assert "--enforce-eager" not in options and "--enforce-eager" in arguments("M", [], on_cpu=True)
    assert main([]) == 2 and "usage" in capsys.readouterr().err
