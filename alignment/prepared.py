"""What tokenized rows are made of, so that a cache can be addressed by it, and who may fill one."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedTokenizerBase

from alignment.errors import UserError
from alignment.fingerprint import path_hash, value_hash
from alignment.rows import is_hub_id, located_rows


def rendering_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how a conversation is rendered: the tokenizer, its special tokens, its template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{tokenizer.name_or_path}: {type(tokenizer).__name__} has no tokenizer.json; expected a fast one"
        )
    whole = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # of the last call, not of the tokenizer
        whole.pop(state)
    return value_hash([whole, tokenizer.special_tokens_map, tokenizer.chat_template])


def rows_version(source: str) -> str:
    """Hash of the rows of a file or folder, or the revision of a hub id."""
    return _revision(source) if is_hub_id(source) else _rows_hash(Path(source))


def _rows_hash(path: Path) -> str:
    if not path.exists():
        next(located_rows(path))  # says what is near
    return path_hash(path)


def _revision(source: str) -> str:
    name = source.partition(":")[0]
    try:
        revision = huggingface_hub.HfApi().dataset_info(name).sha
    except (HfHubHTTPError, HFValidationError, ConnectionError, httpx.HTTPError) as error:
        raise UserError(
            f"{source}: the hub does not say which revision this is: {str(error).splitlines()[0]}"
        ) from None
    return f"{source}@{revision}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time fills a folder, so far as the disk knows locks; atomic.placing_folder does without."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"prepare.cache: {folder.parent} cannot be written: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
