"""Average the weights of reward models (as WARM does: Ramé et al. 2024, arXiv 2401.12187).

    python -m reward.average --config configs/reward/average.yaml

Writes `output_dir/model`. Streams tensor by tensor: memory holds one shard of the result. Sums in fp32, or fp64 for
fp32 weights, and rounds once to the inputs' dtype; the order of the inputs does not change a bit, and models that are
equal average to themselves.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alignment import atomic, job
from alignment.errors import UserError
from alignment.fingerprint import file_hash, weights_hash
from alignment.models import check_model_folder
from alignment.progress import track
from reward.config import AverageConfig

HEAD = "score.weight"
INDEX = "model.safetensors.index.json"
# What sums are held in. fp64 weights are refused: nothing is wide enough for them to come back bit by bit.
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
NOT_ARCHITECTURE = {"_name_or_path", "transformers_version"}
TOKENIZER_FILES = ("*token*", "chat_template*", "vocab*", "merges*", "*.model")


@dataclass(frozen=True)
class Source:
    """One model to average: its share of the sum, and which file holds each of its tensors."""

    folder: Path
    weight: float
    hash: str
    files: dict[str, str]


def run(config: AverageConfig) -> None:
    folders = [Path(model) for model in config.models]
    with job.Job.open("reward.average", config, list(dict.fromkeys(folders))) as this:
        if this.done:
            return
        check_alike(folders)
        sources = _sources(folders, config.weights or [1.0] * len(folders))
        with atomic.replacing_folder(this.dir / "model") as folder:
            count = write_average(sources, folder)
            _copy_the_rest(sources[0].folder, folder)
        _record(this, sources)
        this.finish({"models": len(sources), "tensors": count, "weights_hash": weights_hash(this.dir / "model")})


def _sources(folders: Sequence[Path], weights: Sequence[float]) -> list[Source]:
    """In an order that depends on what the models are, not on the order they were given in."""
    sources = [Source(f, w, weights_hash(f), _files(f)) for f, w in zip(folders, weights, strict=True)]
    return sorted(sources, key=lambda source: (source.hash, source.weight))


def check_alike(folders: Sequence[Path]) -> None:
    """Refuse, before a byte is written, models that cannot be averaged.

    Raises:
        UserError: naming the file, config field or tensor by which two of them differ, or a missing head.
    """
    first, *others = folders
    for folder in folders:
        check_model_folder(folder)
        if HEAD not in _files(folder):
            raise UserError(f"{folder}: not a reward model: its weights hold no {HEAD}")
    tensors = _tensors(first)
    for name, (dtype, _) in tensors.items():
        if dtype == "F64":
            raise UserError(f"{first}: {name} is fp64; expected fp32, bf16 or fp16")
    for other in others:
        _same(first, other, "field of config.json", _architecture(first), _architecture(other))
        _same(first, other, "tokenizer file", _tokenizer(first), _tokenizer(other))
        _same(first, other, "tensor", tensors, _tensors(other))


def _same(first: Path, other: Path, kind: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            values = f"{a.get(name, 'missing')} and {b.get(name, 'missing')}"
            raise UserError(f"{first} and {other} differ in the {kind} {name!r}: {values}")


def _architecture(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in NOT_ARCHITECTURE}


def _tokenizer(folder: Path) -> dict[str, str]:
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: file_hash(path) for path in files}


def _files(folder: Path) -> dict[str, str]:
    """Tensor name -> the safetensors file of `folder` that holds it."""
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path.name)
    return files


def _tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> dtype and shape, from the headers only."""
    found: dict[str, tuple[str, list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def write_average(sources: Sequence[Source], folder: Path) -> int:
    """Write the average's safetensors, sharded as the first source is. Returns the number of tensors."""
    shards: dict[str, list[str]] = {}
    for name, shard in sources[0].files.items():
        shards.setdefault(shard, []).append(name)
    total_bytes = 0
    with ExitStack() as stack:
        opened = [_open_all(source, stack) for source in sources]
        for shard, names in track(shards.items(), len(shards), "average"):
            tensors = {
                name: average([model[name].get_tensor(name) for model in opened], sources, name) for name in names
            }
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            atomic.sync(folder / shard)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        atomic.write_json(
            folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sources[0].files)}
        )
    return len(sources[0].files)


def _open_all(source: Source, stack: ExitStack) -> dict[str, Any]:
    files = {
        name: stack.enter_context(safe_open(source.folder / name, framework="pt"))
        for name in sorted(set(source.files.values()))
    }
    return {tensor: files[name] for tensor, name in source.files.items()}


def average(tensors: Sequence[torch.Tensor], sources: Sequence[Source], name: str) -> torch.Tensor:
    """The weighted mean of one tensor, rounded once. Tensors that are not of floats must be equal.

    Raises:
        UserError: a value that is not finite, or integers that differ.
    """
    dtype = tensors[0].dtype
    if not dtype.is_floating_point:
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise UserError(f"{name}: {dtype} cannot be averaged, and the models differ in it")
        return tensors[0]
    result = tensors[0].to(WIDER[dtype]) * sources[0].weight
    for tensor, source in zip(tensors[1:], sources[1:], strict=True):
        result.add_(tensor.to(WIDER[dtype]), alpha=source.weight)
    # Divided last: the sum of equal weights is exact, and a tie in the rounding below is then a true one.
    rounded = result.div_(sum(source.weight for source in sources)).to(dtype)
    if not torch.isfinite(rounded).all():
        broken = [str(s.folder) for t, s in zip(tensors, sources, strict=True) if not torch.isfinite(t).all()]
        raise UserError(f"{name}: not finite in {', '.join(broken) or 'the average'}")
    return rounded


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Config and tokenizer, the same in all inputs; not what only a trainer reads."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)


def _record(this: job.Job, sources: Sequence[Source]) -> None:
    """Which weights went in, and with what share, into run.json."""
    record = json.loads((this.dir / "run.json").read_text())
    averaged = [{"model": str(s.folder), "weights_hash": s.hash, "weight": s.weight} for s in sources]
    atomic.write_json(this.dir / "run.json", record | {"averaged": averaged})


def plan(config: AverageConfig) -> list[str]:
    check_alike([Path(model) for model in config.models])
    weights = config.weights or [1.0] * len(config.models)
    return [f"average {m}: {w / sum(weights):.3f}" for m, w in zip(config.models, weights, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    return job.main(AverageConfig, run, plan, argv)


if __name__ == "__main__":
    raise SystemExit(main())
