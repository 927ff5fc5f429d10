"""The mean of models' weights, streamed: a mebibyte of each model at a time, whatever the size of a model or a shard.

A safetensors file is an 8-byte length, a JSON header of that length (name -> dtype, shape, place), and the tensors.
The models may be cut into shards differently; the mean is cut as the first is, by a copy of its headers.

Sums are held in fp64 and rounded once, to the models' dtype: every mean becomes the nearest number.
"""

import errno
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alignment import atomic, cores
from alignment.errors import UserError
from alignment.progress import track

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # what is averaged; others must be equal
PIECE_BYTES = 1 << 20
MOST_THREADS = 8


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: bytes `start` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A model to average, and its share of the sum."""

    folder: Path
    weight: float
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """Bytes `first` to `end` of a tensor."""

    name: str
    first: int
    end: int


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Name -> place of every tensor of a model folder, from the headers of its safetensors files.

    Raises:
        UserError: a damaged file, or a tensor that two files hold.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, begin = _header(file)
        for name, facts in json.loads(header).items():
            if name == "__metadata__":
                continue
            if name in found:
                raise UserError(f"{folder}: both {found[name].file.name} and {file.name} hold the tensor {name!r}")
            start, end = (begin + offset for offset in facts["data_offsets"])
            found[name] = Tensor(file, facts["dtype"], tuple(facts["shape"]), start, end)
    return found


def _header(file: Path) -> tuple[bytes, int]:
    """The JSON header, and where the tensors begin."""
    try:
        with safe_open(file, framework="pt"):
            pass  # checks the header, and the file's size against it
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {error}") from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return opened.read(length), 8 + length


def write_mean(sources: Sequence[Source], folder: Path) -> None:
    """Write the weighted mean's safetensors, with their index if there are several.

    Raises:
        UserError: a value that is not finite, or tensors of no float type that differ.
    """
    shards: dict[Path, list[str]] = {}
    for name, tensor in sources[0].tensors.items():
        shards.setdefault(tensor.file, []).append(name)
    pieces = [(shard, piece) for shard, names in shards.items() for piece in _pieces(sources[0], names)]
    with ExitStack() as stack:
        mean = _Mean(sources, folder, stack)
        pool = stack.enter_context(_threads())
        done = pool.map(mean.write, pieces)
        for _ in track(done, len(pieces), "average"):
            pass
    for shard in shards:
        atomic.sync(folder / shard.name)
    if len(shards) > 1:
        names = {name: tensor.file.name for name, tensor in sources[0].tensors.items()}
        total = sum(tensor.end - tensor.start for tensor in sources[0].tensors.values())
        atomic.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})


def _pieces(source: Source, names: Sequence[str]) -> Iterator[Piece]:
    for name in names:
        size = source.tensors[name].end - source.tensors[name].start
        for first in range(0, size, PIECE_BYTES):
            yield Piece(name, first, min(first + PIECE_BYTES, size))


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """One thread a core; torch must not start as many again in each."""
    before = torch.get_num_threads()
    count = min(MOST_THREADS, cores.count())
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _Mean:
    """Open files, and one thread's room for the pieces that are summed."""

    def __init__(self, sources: Sequence[Source], folder: Path, stack: ExitStack) -> None:
        self.sources = sources
        self.total = sum(source.weight for source in sources)
        self.room = threading.local()
        self.read_from = {
            file: _open(file, os.O_RDONLY, stack)
            for source in sources
            for file in {tensor.file for tensor in source.tensors.values()}
        }
        self.write_to = {file: _create_like(file, folder, stack) for file in _files(sources[0])}

    def write(self, job: tuple[Path, Piece]) -> None:
        shard, piece = job
        first = self._read(0, piece)
        dtype = DTYPES.get(self.sources[0].tensors[piece.name].dtype)
        if dtype is None:
            self._check_equal(first, piece)
        else:
            self._average(first.view(dtype), piece)
        place = self.sources[0].tensors[piece.name].start + piece.first
        if os.pwrite(self.write_to[shard], first.numpy().data, place) != len(first):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(shard.name))

    def _average(self, values: torch.Tensor, piece: Piece) -> None:
        """Put the mean of a piece in the place of the first model's values of it."""
        sums, wide = (self._room(name, torch.float64)[: len(values)] for name in ("sums", "wide"))
        sums.copy_(values).mul_(self.sources[0].weight)
        for number, source in enumerate(self.sources[1:], start=1):
            # Not add_(..., alpha): where it is fused, a product is not rounded as in a plain sum of products.
            sums.add_(wide.copy_(self._read(number, piece).view(values.dtype)).mul_(source.weight))
        # Divided last: the sum of equal weights is exact, and a tie in the rounding is then a true one.
        sums.div_(self.total)
        values.copy_(sums if values.dtype is torch.float32 else round_to_odd(sums))
        if not torch.isfinite(values).all():
            self._refuse(piece, values.dtype)

    def _check_equal(self, first: torch.Tensor, piece: Piece) -> None:
        tensor = self.sources[0].tensors[piece.name]
        if any(not torch.equal(self._read(number, piece), first) for number in range(1, len(self.sources))):
            raise UserError(f"{piece.name}: {tensor.dtype} cannot be averaged, and the models differ in it")

    def _refuse(self, piece: Piece, dtype: torch.dtype) -> None:
        broken = [
            str(source.folder)
            for number, source in enumerate(self.sources)
            if not torch.isfinite(self._read(number, piece).view(dtype)).all()
        ]
        raise UserError(f"{piece.name}: not finite in {', '.join(broken) or 'the average'}")

    def _read(self, number: int, piece: Piece) -> torch.Tensor:
        """The bytes of a piece of the first model, or of another: two rooms, the second is soon overwritten."""
        tensor = self.sources[number].tensors[piece.name]
        data = self._room("first" if number == 0 else "other", torch.uint8)[: piece.end - piece.first]
        if os.preadv(self.read_from[tensor.file], [data.numpy().data], tensor.start + piece.first) != len(data):
            raise UserError(f"{tensor.file}: has become shorter while it was read")
        return data

    def _room(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if not hasattr(self.room, name):
            setattr(self.room, name, torch.empty(PIECE_BYTES, dtype=dtype))
        room: torch.Tensor = getattr(self.room, name)
        return room


def round_to_odd(values: torch.Tensor) -> torch.Tensor:
    """fp64 to fp32 such that rounding the result to bf16 or fp16 is as rounding `values` at once.

    Cut off toward zero, with the last bit set where something was cut (Boldo, Melquiond 2008, Emulation of FMA and
    correctly rounded sums, section 2). torch rounds fp64 to fp32 first, which may put a number on a tie that it is not.
    """
    near = values.to(torch.float32)
    back = near.double()
    bits = near.view(torch.int32)
    bits -= (back.abs() > values.abs()).int()
    bits |= (back != values).int()
    return near


def _files(source: Source) -> list[Path]:
    return list(dict.fromkeys(tensor.file for tensor in source.tensors.values()))


def _open(file: Path, flags: int, stack: ExitStack) -> int:
    descriptor = os.open(file, flags, 0o666)
    stack.callback(os.close, descriptor)
    return descriptor


def _create_like(file: Path, folder: Path, stack: ExitStack) -> int:
    """A file in `folder` of the size of `file`, with its header."""
    descriptor = _open(folder / file.name, os.O_WRONLY | os.O_CREAT, stack)
    os.posix_fallocate(descriptor, 0, file.stat().st_size)
    header, begin = _header(file)
    os.pwrite(descriptor, (begin - 8).to_bytes(8, "little") + header, 0)
    return descriptor
