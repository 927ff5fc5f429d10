"""The cache: each text is embedded once, whatever was killed, whoever else fills it. The model counts letters."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignment.errors import UserError
from data_builders import embeddings
from data_builders.config import EmbeddingConfig
from data_builders.embeddings import embed, embedded
from data_builders.encoders import Encoded, Encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"
TEXTS = [f"text number {number % 90} of {number % 4}" for number in range(400)]  # 180 different ones


def letters(text: str) -> list[float]:
    return [float(text.count(letter)) for letter in LETTERS]


def expected(texts: Sequence[str]) -> np.ndarray:
    counts = np.array([letters(text) for text in texts])
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


class Letters(Encoder):
    """Counts letters, notes what it was asked and takes 30 letters."""

    def __init__(self, make: Any = letters) -> None:
        self.asked: list[str] = []
        self.calls = 0
        self.make = make

    def encode(self, texts: Sequence[str]) -> Encoded:
        self.calls += 1
        if list(texts) != [embeddings.PROBE]:
            self.asked += texts
        vectors = np.array([self.make(text) for text in texts], dtype=np.float32)
        return Encoded(vectors, np.array([len(text) > 30 for text in texts]))

    def close(self) -> None:
        pass


@pytest.fixture
def config(tmp_path: Path) -> EmbeddingConfig:
    return EmbeddingConfig(
        model="letters", backend="endpoint", endpoints=["http://a:1"], dtype="float32", cache=tmp_path / "cache"
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SHARD", 25)


def use(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> Any:
    monkeypatch.setattr(embeddings, "open_encoder", lambda config: encoder)
    return encoder


def shards(config: EmbeddingConfig) -> list[Path]:
    return sorted(config.cache.glob("*/*.safetensors"))


def test_each_text_is_embedded_once(config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = use(monkeypatch, Letters())
    found = embed(TEXTS, config)
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected(TEXTS), atol=1e-6)
    assert encoder.asked == list(dict.fromkeys(TEXTS)) and encoder.calls == 1 + 8  # the probe, and 180 texts by 25
    more = ["another one", TEXTS[3], "another one"]
    np.testing.assert_allclose(embed(more, config), expected(more), atol=1e-6)
    assert encoder.asked[180:] == ["another one"]
    files = {path.name for path in config.cache.glob("*/*")}
    assert len(files) == 9 + 2, "the result of a call leaves no file"


def test_what_is_cached_opens_no_model(config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Letters())
    first = embedded(iter(TEXTS), config)
    monkeypatch.setattr(embeddings, "open_encoder", lambda config: pytest.fail("a model was opened"))
    again = embedded(reversed(TEXTS), config)
    assert np.array_equal(again.vectors_ND[::-1], first.vectors_ND)


def test_half_precision_is_of_unit_length_too(config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Letters())
    found = embed(TEXTS, config.model_copy(update={"dtype": "float16"}))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected(TEXTS), atol=5e-4)


@pytest.mark.parametrize("change", [{"prefix": "query: "}, {"max_tokens": 9}, {"dtype": "float16"}, {"model": "b"}])
def test_other_settings_are_other_vectors(
    config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    encoder = use(monkeypatch, Letters())
    embed(["a"], config)
    embed(["a"], config.model_copy(update=change))
    assert encoder.asked == ["a", change.get("prefix", "") + "a"]


def test_cut_texts_are_counted_also_where_they_are_cached(
    config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, Letters())
    texts = ["short", "long " * 10, "short", "long " * 10, "long " * 11]
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            found = embedded(texts, config)
        assert found.truncated_N.tolist() == [False, True, False, True, True]
        assert caplog.messages == ["letters: 3 of 5 texts are longer than it takes and were cut"]
        caplog.clear()


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_vector_of_no_direction_names_its_row(
    config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    use(monkeypatch, Letters(lambda text: [bad] * 5 if text == "text number 31 of 3" else [1.0] * 5))
    with pytest.raises(UserError, match="letters: the vector of row 32 is zero or not finite, .*'text number 31 of 3'"):
        embed(TEXTS, config)
    assert len(shards(config)) == 1


def test_the_model_behind_a_name_may_not_change(config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Letters())
    embed(TEXTS, config)
    use(monkeypatch, Letters(lambda text: letters(text)[::-1]))
    with pytest.raises(UserError, match="letters: not the model of that name whose vectors .* choose another"):
        embed(["fresh"], config)


def test_a_damaged_shard_is_named(config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Letters())
    embed(TEXTS, config)
    shards(config)[2].write_bytes(b"x" * 10)
    with pytest.raises(UserError, match=f"{shards(config)[2].name}: a damaged shard of the cache, delete it"):
        embed(TEXTS, config)


WORKER = """
import importlib.util, json, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("stand_in", sys.argv[1])
stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)
from data_builders import embeddings
from data_builders.config import EmbeddingConfig

class Hanging(stand_in.Letters):
    def encode(self, texts):
        if len(self.asked) == int(sys.argv[4]):
            signal.pause()
        return super().encode(texts)

encoder = Hanging()
embeddings.SHARD, embeddings.open_encoder = 25, lambda config: encoder
found = embeddings.embed(json.loads(sys.argv[2]), EmbeddingConfig.model_validate_json(sys.argv[3]))
print(len(encoder.asked))
"""


def worker(texts: Sequence[str], config: EmbeddingConfig, hangs_after: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORKER, __file__, json.dumps(texts), config.model_dump_json(), str(hangs_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_beside_another_job_and_resumed(config: EmbeddingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is killed while another fills the same cache: the three shards that it had added stay."""
    many = [f"{number} of the many" for number in range(600)]
    killed, other = worker(many, config, 75), worker([*many[500:], *TEXTS], config, -1)
    assert other.communicate(timeout=100)[0] == "280\n" and other.returncode == 0
    deadline = time.monotonic() + 100
    while len(shards(config)) < 3 + 12:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    encoder = use(monkeypatch, Letters())
    whole = embed([*many, *TEXTS], config)
    assert encoder.asked == many[75:500]
    np.testing.assert_allclose(whole, expected([*many, *TEXTS]), atol=1e-6)
    assert np.array_equal(whole, embed([*many, *TEXTS], config.model_copy(update={"cache": config.cache / "fresh"})))
