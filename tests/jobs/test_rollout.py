"""Real vLLM on a tiny Ernie4_5_Moe: two fresh processes, the first killed between two chunks."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from alignment import chat

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def found(rollouts: Path) -> dict[str, Any]:
    return json.loads((rollouts / "whole.json").read_text())


def samples_of(store: str) -> list[dict[str, Any]]:
    return [row for shard in sorted(Path(store).rglob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def test_killed_run_and_fresh_process_give_the_same_samples(found):
    resumed, fresh, other = map(samples_of, found["stores"])
    assert len(fresh) == 80
    assert resumed == fresh  # one shard is of the killed process
    assert sorted(s["token_ids"] for s in other) != sorted(s["token_ids"] for s in fresh)
    assert len({tuple(s["token_ids"]) for s in fresh}) > 60
    assert {s["finish_reason"] for s in fresh} == {"stop", "length"}
    assert all((s["token_ids"][-1] == 1) == (s["finish_reason"] == "stop") for s in fresh)
    assert found["same_again"]


def test_a_sample_does_not_depend_on_its_neighbours(found):
    assert found["alone_as_together"]


def test_logprobs_are_those_of_transformers(found):
    assert found["logprob_gap.1"] < 1e-3
    assert found["logprob_gap.2"] < 1e-3


def test_reload_changes_the_weights_and_is_proven(found):
    assert found["reload"]["gap"] < 1e-4 < 0.1 < found["reload"]["before"]
    assert found["changed_by_reload"] and found["back_again"]


def test_a_reload_that_fails_is_noticed(found):
    assert "differ by" in found["half_loaded"]
    assert "stale" in found["not_loaded"]
    assert "moe_intermediate_size is 96, expected 64" in found["other_shape"]


def test_the_engine_leaves_the_process_as_it_was(found):
    assert found["environment_kept"] and found["threads_kept"] and found["random_state_kept"]
    assert found["idle_cpu_share"] < 0.2
    assert found["freed_mib"] > 200  # the cache alone has 256
    assert found["dist_closed"]


def test_vllm_s_chat_is_what_training_and_transformers_render(found, rollouts):
    """Token by token: tools, calls, both modes; and the training row goes on from there."""
    words = AutoTokenizer.from_pretrained(rollouts / "chat")
    answer = {"role": "assistant", "content": "<think>\nx\n</think>\n\nIt costs 12. 二"}
    prompts = [each["prompt"] for each in found["chats"]]
    assert len({tuple(prompt) for prompt in prompts}) == 4
    for each in found["chats"]:
        request, prompt = each["request"], each["prompt"]
        options = chat.template_options(request)
        assert prompt == chat.render_prompt(words, request["messages"], **options)
        row = chat.render(words, [*request["messages"], answer], **options).input_ids
        assert row[:-1] == prompt + chat.render_completion(words, answer["content"])
        for message in request["messages"]:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])  # as transformers wants them
        theirs = words.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_dict=False, **options
        )
        assert prompt == theirs
    text = words.decode(prompts[1])
    assert all(
        part in text for part in (chat.THINKING_PROMPT, '"description": "ราคา"', '{"item": "ส้ม 😀", "count": 3}')
    )
