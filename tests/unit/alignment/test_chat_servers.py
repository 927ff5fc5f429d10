"""Chat completions of servers that are known by name: what is asked, what is stored, and what a refusal is."""

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.config import RequestsConfig, SamplingConfig
from alignment.errors import UserError
from alignment.rollout.chat_servers import ChatServers, sample_chat
from alignment.rollout.sampling import Chunk
from alignment.rollout.seeds import sample_seed

spec = importlib.util.spec_from_file_location("scripted_server", Path(__file__).with_name("scripted_server.py"))
scripted = sys.modules.setdefault("scripted_server", importlib.util.module_from_spec(spec))
spec.loader.exec_module(scripted)

REQUESTS = RequestsConfig(tries=3, backoff_seconds=0.01, health_seconds=0.1, patience_seconds=0.2, timeout_seconds=5)
SAMPLING = SamplingConfig(n=2, max_tokens=6, temperature=0.7, top_p=0.9)
SECRET = "sk-not-for-logs"


def told(content: Any, finish_reason: Any = "stop", **message: Any) -> Any:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"total_tokens": 5}}


def prompt(name: str, **changes: Any) -> dict[str, Any]:
    return {"id": name, "prompt": [{"role": "user", "content": f"{name}?"}], **changes}


class Server(scripted.ScriptedServer):
    """Serves `m` alone."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        super().__init__(lambda _, body: answer(body))

    @property
    def bodies(self) -> list[Any]:
        return [body for _, body in self.posts]


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Any], Any]], Server]]:
    opened: list[Server] = []

    def start(answer: Callable[[Any], Any]) -> Server:
        opened.append(Server(answer))
        return opened[-1]

    yield start
    for server in opened:
        server.close()


def asked(server: Server, root: Path, *prompts: dict[str, Any], model: str = "m", **body: Any) -> list[Chunk]:
    with ChatServers(model, [server.address], REQUESTS, body, key=SECRET) as servers:
        return list(sample_chat(servers, prompts, root, SAMPLING, seed=3, chunk_prompts=2))


def texts(chunks: list[Chunk]) -> list[list[str]]:
    return [[s.text for s in samples or ()] for chunk in chunks for samples in chunk.samples]


def test_what_is_asked(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda _: told("4"))
    switched = prompt("b", chat_template_kwargs={"enable_thinking": True})
    asked(server, tmp_path, prompt("a"), switched, top_k=20, top_p=None)
    by_text = {(body["messages"][0]["content"], body["seed"]): body for body in server.bodies}
    assert len(by_text) == len(server.bodies) == 4
    seeds = [sample_seed(3, "a", index) % 2**31 for index in range(2)]
    assert [by_text["a?", seed] for seed in seeds] == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "a?"}],
            "max_tokens": 6,
            "temperature": 0.7,
            "seed": seed,
            "top_k": 20,
        }
        for seed in seeds
    ]
    assert {str(body.get("chat_template_kwargs")) for body in server.bodies} == {"None", "{'enable_thinking': True}"}
    assert server.authorization == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_that_comes_apart_is_a_block_of_thinking(serve: Any, tmp_path: Path, name: str) -> None:
    chunks = asked(serve(lambda _: told("It is 4.", **{name: "\n2 + 2\n"})), tmp_path, prompt("a"))
    assert texts(chunks) == [["<think>\n2 + 2\n</think>\nIt is 4."] * 2]
    [sample, _] = chunks[0].samples[0]
    assert (sample.finish_reason, sample.token_ids) == ("stop", []) and math.isnan(sample.logprob)


def test_a_block_of_thinking_in_the_answer_is_left_alone(serve: Any, tmp_path: Path) -> None:
    text = "<think>2 + 2</think> 4"
    assert texts(asked(serve(lambda _: told(text, reasoning=None)), tmp_path, prompt("a"))) == [[text] * 2]


def test_how_answers_end(serve: Any, tmp_path: Path) -> None:
    ends = {"a?": told(None, "length", reasoning="2 +"), "b?": told("", "content_filter"), "c?": told("4")}
    server = serve(lambda body: ends[body["messages"][0]["content"]])
    chunks = asked(server, tmp_path, *map(prompt, "abc"))
    found = [(samples[0].finish_reason, samples[0].text) for chunk in chunks for samples in chunk.samples]
    cut_off, filtered = ("length", "<think>\n2 +\n</think>\n"), ("refused", "finish_reason content_filter")
    assert found == [cut_off, filtered, ("stop", "4")]


def test_what_is_stored_is_not_asked_again(serve: Any, tmp_path: Path) -> None:
    counted = iter(range(100))
    first = serve(lambda _: told(str(next(counted))))
    whole = asked(first, tmp_path, *map(prompt, "abc"))
    other = serve(lambda _: told("other"))
    assert texts(asked(other, tmp_path, *map(prompt, "abc"))) == texts(whole), "another server of the same model"
    assert not other.posts
    longer = asked(other, tmp_path, *map(prompt, "abcd"))
    assert texts(longer) == [*texts(whole)[:2], ["other"] * 2, ["other"] * 2], "chunks that are not there alone"
    for changes in (
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": [{"role": "user", "content": "x"}]},
    ):
        assert texts(asked(other, tmp_path, prompt("a", **changes), prompt("b"))) == [["other"] * 2] * 2
    assert texts(asked(other, tmp_path, prompt("a"), prompt("b"), top_k=1)) == [["other"] * 2] * 2


def test_a_damaged_shard_is_asked_again_and_said(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda _: told("4"))
    assert not asked(server, tmp_path, prompt("a"))[0].resampled
    [shard] = tmp_path.rglob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:50])
    assert asked(server, tmp_path, prompt("a"))[0].resampled and len(server.posts) == 4


def test_a_request_that_is_refused_is_a_sample_that_says_so(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda _: told("4"))
    server.script.extend(["400", "422"])
    [chunk] = asked(server, tmp_path, prompt("a"), prompt("b"))
    found = [sample for samples in chunk.samples for sample in samples]
    assert sorted(s.finish_reason for s in found) == ["refused", "refused", "stop", "stop"]
    assert len(server.posts) == 4, "asked once each"
    assert {s.text for s in found if s.finish_reason == "refused"} == {
        f'{server.address}/v1/chat/completions: {status}: {{"error": "busy"}}' for status in (400, 422)
    }


def test_where_every_request_is_refused_the_request_is_wrong(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda _: told("4"))
    server.for_ever = "400"
    with pytest.raises(UserError, match="/v1/chat/completions: 400"):
        asked(server, tmp_path, prompt("a"), prompt("b"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_server_must_serve_the_model(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda _: told("4"))
    server.models = {"data": [{"id": "teacher-large"}, {"id": "other"}]}
    with pytest.raises(UserError, match=r"serves no model 'teacher_large'; did you mean 'teacher-large'\?"):
        asked(server, tmp_path, prompt("a"), model="teacher_large")


def test_trouble_is_tried_again_and_counted(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda _: told("4"))
    server.script.extend(["500", "garbage"])
    with ChatServers("m", [server.address], REQUESTS, {}) as servers:
        chunks = list(sample_chat(servers, [prompt("a")], tmp_path, SAMPLING, seed=3))
        assert sum(servers.faults.values()) == 2
        while len(server.gets) < 3:
            time.sleep(0.01)
    assert texts(chunks) == [["4", "4"]]
    assert set(server.gets) == {"/v1/models"}, "few servers but vLLM's have /health"
