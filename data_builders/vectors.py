"""Vectors of rows, read by blocks: files larger than memory are never in memory whole.

Shapes: N rows, D dimensions, B rows of a block.

A block is read, not mapped: mapped pages would count as this process's memory until the system takes them back.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignment.errors import UserError

Vectors = NDArray[np.floating]  # [N, D]: an array, or a np.memmap of a whole file

BLOCK_ROWS = 16_384


def load(path: Path) -> Vectors:
    """The array in a .npy file, memory-mapped.

    Raises:
        UserError: no such file, or not a two-dimensional array of floats.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of vectors") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a .npy file of vectors: {error}") from None
    if not isinstance(array, np.memmap) or array.ndim != 2 or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"{path}: expected floats [rows, dimensions], found {found}")
    return array


def blocks(vectors_ND: Vectors, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The number of a block's first row and its rows [B, D], in order, at unit length.

    Raises:
        UserError: a row that is zero or not finite, here and below.
    """
    for start in range(0, len(vectors_ND), rows):
        block = _read(vectors_ND, start, min(rows, len(vectors_ND) - start))
        yield start, _unit(block, vectors_ND, np.arange(start, start + len(block)))


def take(vectors_ND: Vectors, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """The rows of `indices` at unit length."""
    taken = np.empty((len(indices), vectors_ND.shape[1]), np.float32)
    for place, index in enumerate(indices.tolist()):
        taken[place] = _read(vectors_ND, index, 1)[0]
    return _unit(taken, vectors_ND, indices)


def sample(vectors_ND: Vectors, rows: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """At most `rows` of them, drawn without replacement, in order, at unit length."""
    chosen = rng.choice(len(vectors_ND), size=min(rows, len(vectors_ND)), replace=False)
    return take(vectors_ND, np.sort(chosen))


def _read(vectors_ND: Vectors, start: int, rows: int) -> NDArray[np.floating]:
    if not isinstance(vectors_ND, np.memmap) or vectors_ND.filename is None or not vectors_ND.flags.c_contiguous:
        return vectors_ND[start : start + rows]
    width = vectors_ND.shape[1]
    # `offset` is that of the file's first row: callers pass whole files, as `load` and `embed` return them.
    offset = vectors_ND.offset + start * width * vectors_ND.itemsize
    return np.fromfile(vectors_ND.filename, vectors_ND.dtype, rows * width, offset=offset).reshape(rows, width)


def _unit(block_BD: NDArray[np.floating], of: Vectors, numbers_B: NDArray[np.int64]) -> NDArray[np.float32]:
    """`numbers_B` are the rows' numbers in `of`."""
    block = block_BD.astype(np.float32)
    norms = np.linalg.norm(block, axis=1)
    usable = (norms > 0) & np.isfinite(norms)
    if not usable.all():
        file = of.filename if isinstance(of, np.memmap) and of.filename is not None else "vectors"
        raise UserError(f"{file} row {numbers_B[usable.argmin()] + 1}: the vector is zero or not finite")
    return block / norms[:, None]
