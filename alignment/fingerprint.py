"""Content hashes: what a cache, a resumed job or a set of samples is addressed by."""

import json
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 1 << 22


def text_hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def value_hash(value: Any) -> str:
    """Hash of a JSON value; the order of keys does not matter."""
    return text_hash(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))


def file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def path_hash(path: Path) -> str:
    """Hash of a file's bytes, or of every file below a folder with its name; nothing hidden counts."""
    if path.is_file():
        return file_hash(path)
    names = {p.relative_to(path) for p in path.rglob("*") if p.is_file()}
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    return value_hash({str(name): file_hash(path / name) for name in visible})


def weights_hash(folder: Path) -> str:
    """Hash of a model folder's safetensors files: the version of its weights."""
    files = sorted(folder.glob("*.safetensors"))
    return value_hash({p.name: file_hash(p) for p in files})
