"""Embeddings of texts as a cached column: each text is embedded once, and its vector read from disk ever after.

The cache holds a folder for each model with its settings, and in it shards that are only ever added, whole: the hashes
of up to SHARD texts, their vectors, and which were cut at the model's maximum. A killed run loses the shard that it was
at. Jobs may share the folder at the same time: each adds shards of its own, of which the names are their contents'.
About 200 bytes of memory for each text of the folder; vectors stay on disk.

Suffixes: N texts, S texts of a shard, D dimensions.
"""

import json
import logging
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from alignment import atomic
from alignment.errors import UserError
from alignment.fingerprint import path_hash, value_hash
from alignment.progress import track
from alignment.rows import is_hub_id
from data_builders.config import EmbeddingConfig
from data_builders.encoders import Encoded, Encoder, check_folder, local_folder, open_encoder, same_direction

SHARD = 1024  # texts
KEY_BYTES = 16
PROBE = "Zwölf cups of 茶 cost 36 dollars; how much is one?"

Vectors = NDArray[np.float16] | NDArray[np.float32]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded:
    """Vectors of texts, row for row."""

    vectors_ND: Vectors  # of unit length, in a file of their own that vanishes with the array
    truncated_N: NDArray[np.bool_]  # longer than the model takes


def embed(texts: Sequence[str], config: EmbeddingConfig) -> Vectors:
    """Vectors of `texts`, memory-mapped: [len(texts), dimensions], of unit length, row i of text i.

    Raises:
        UserError: no such model, a server that does not answer, or a vector that is zero or not finite (row named).
    """
    return embedded(texts, config).vectors_ND


def embedded(texts: Iterable[str], config: EmbeddingConfig) -> Embedded:
    """As `embed`, also of texts that come one after the other, and which of them were cut at the model's maximum."""
    with ExitStack() as stack:
        cache = _Cache(config, stack)
        rows = array("q")  # of each text the row of its vector in the cache
        total = len(texts) if isinstance(texts, Sequence) else None
        for number, text in enumerate(track(texts, total, "embed"), start=1):
            rows.append(cache.row(number, text))
        cache.flush()
    found = cache.gather(np.frombuffer(rows, dtype=np.int64))
    if cut := int(found.truncated_N.sum()):
        logger.warning("%s: %d of %d texts are longer than it takes and were cut", config.model, cut, len(rows))
    return found


def check_embedding(config: EmbeddingConfig) -> None:
    """What can be checked without weights: the folder of a model on this machine."""
    if config.backend != "endpoint" and not is_hub_id(config.model):
        check_folder(Path(config.model))


def embedding_inputs(config: EmbeddingConfig | None) -> list[Path]:
    """The model as an input of a job, where it is a folder of this machine."""
    if config is None or config.backend == "endpoint" or is_hub_id(config.model):
        return []
    return [Path(config.model)]


@dataclass(frozen=True)
class _Shard:
    path: Path
    first: int  # row of the cache
    after: int


class _Cache:
    """The folder of one model and its settings. Rows count through the shards."""

    def __init__(self, config: EmbeddingConfig, stack: ExitStack) -> None:
        self._config, self._stack = config, stack
        self._encoder: Encoder | None = None
        settings = _settings(config)
        self._folder = config.cache / value_hash(settings)
        self._rows: dict[bytes, int] = {}  # hash of a text -> row
        self._shards: list[_Shard] = []
        self._fresh: list[tuple[int, str]] = []  # not embedded yet: the number of the text, for messages, and it
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"embedding.cache: {config.cache} cannot be written: {error.strerror}") from None
        atomic.write_json(self._folder / "settings.json", settings)
        for path in sorted(self._folder.glob("*.safetensors")):
            self._index(path, _read(path, "keys_S").tobytes())

    def row(self, number: int, text: str) -> int:
        """The row where the vector of `text` is or will be."""
        key = _key(text)
        row = self._rows.get(key)
        if row is not None:
            return row
        self._fresh.append((number, text))
        row = self._rows[key] = len(self._rows)
        if len(self._fresh) == SHARD:
            self.flush()
        return row

    def flush(self) -> None:
        """Embed what is not embedded yet, and add it as a shard."""
        if not self._fresh:
            return
        found = self._encode(self._fresh)
        keys = b"".join(_key(text) for _, text in self._fresh)
        path = self._folder / f"{xxh3_128_hexdigest(keys)}.safetensors"
        with atomic.replacing(path) as temporary:
            save_file(
                {
                    "keys_S": np.frombuffer(keys, dtype=np.uint8),
                    "vectors_SD": found.vectors_SD.astype(self._config.dtype),
                    "truncated_S": found.truncated_S,
                },
                temporary,
            )
        first = self._shards[-1].after if self._shards else 0
        self._shards.append(_Shard(path, first, first + len(self._fresh)))
        self._fresh = []

    def gather(self, rows_N: NDArray[np.int64]) -> Embedded:
        """The vectors of rows, read shard by shard."""
        truncated_N = np.zeros(len(rows_N), dtype=np.bool_)
        if not len(rows_N):
            return Embedded(np.zeros((0, 0), dtype=self._config.dtype), truncated_N)
        order_N = np.argsort(rows_N, kind="stable")
        sorted_N = rows_N[order_N]
        vectors_ND: Any = None
        for shard in self._shards:
            begin, end = np.searchsorted(sorted_N, [shard.first, shard.after])
            if begin == end:
                continue
            texts, rows = order_N[begin:end], sorted_N[begin:end] - shard.first
            vectors_SD = _read(shard.path, "vectors_SD")
            if vectors_ND is None:
                vectors_ND = _scratch(self._folder, (len(rows_N), vectors_SD.shape[1]), self._config.dtype)
            vectors_ND[texts] = vectors_SD[rows]
            truncated_N[texts] = _read(shard.path, "truncated_S")[rows]
        return Embedded(vectors_ND, truncated_N)

    def _index(self, path: Path, keys: bytes) -> None:
        """A shard of another run; two that ran at the same time may both hold a text, of which the first counts."""
        first = self._shards[-1].after if self._shards else 0
        found = [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]
        for row, key in enumerate(found, start=first):
            self._rows.setdefault(key, row)
        self._shards.append(_Shard(path, first, first + len(found)))

    def _encode(self, fresh: Sequence[tuple[int, str]]) -> Encoded:
        if self._encoder is None:
            self._encoder = self._stack.enter_context(open_encoder(self._config))
            self._check_model(self._encoder)
        found = self._encoder.encode([self._config.prefix + text for _, text in fresh])
        return Encoded(self._unit_length(found.vectors_SD, fresh), found.truncated_S)

    def _unit_length(self, vectors_SD: NDArray[np.float32], fresh: Sequence[tuple[int, str]]) -> NDArray[np.float32]:
        lengths_S = np.linalg.norm(vectors_SD, axis=1)
        for (number, text), length in zip(fresh, lengths_S, strict=True):
            if not 0 < length < np.inf:
                raise UserError(
                    f"{self._config.model}: the vector of row {number} is zero or not finite, its text: {text!r:.60}"
                )
        return vectors_SD / lengths_S[:, None]

    def _check_model(self, encoder: Encoder) -> None:
        """Does it make the vectors that this folder holds? The name of a model at a server says nothing of it."""
        [now_D] = encoder.encode([PROBE]).vectors_SD
        path = self._folder / "probe.json"
        if not path.exists():
            atomic.write_json(path, now_D.tolist())
            return
        before_D = np.array(json.loads(path.read_text(encoding="utf-8")))
        if not same_direction(before_D, now_D):
            raise UserError(
                f"{self._config.model}: not the model of that name whose vectors {self._folder} holds; "
                "choose another embedding.cache"
            )


def _settings(config: EmbeddingConfig) -> dict[str, Any]:
    """All that decides the vector of a text; the model by its files, at a server by its name."""
    model = config.model if config.backend == "endpoint" else path_hash(local_folder(config))
    return {"model": model, **config.model_dump(include={"backend", "prefix", "max_tokens", "dtype"})}


def _key(text: str) -> bytes:
    return xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: a damaged shard of the cache, delete it: {error}") from None


def _scratch(folder: Path, shape: tuple[int, int], dtype: str) -> Any:
    """An array in a file without a name, whose space is free again when the array is gone."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)
