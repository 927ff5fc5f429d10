"""Per-token log-probabilities of the reference, computed once and kept in a file beside the run.

The file is bound to the weights and the pairs it was made from; with others it is refused. It holds one value a token:
sums over a sequence, which TRL caches, cannot be weighted by token afterwards.
"""

from pathlib import Path

import numpy as np
import torch
import xxhash
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alignment import atomic
from alignment.errors import UserError

SIDES = ("chosen", "rejected")


class ReferenceLogps:
    """Reference log-probabilities of every completion token of a set of pairs."""

    def __init__(self, values: dict[str, Tensor], lengths: dict[str, list[int]]):
        """`values`: per side all rows' values, one after another, float32; `lengths`: the tokens of each row."""
        self._rows = {side: torch.split(values[side], lengths[side]) for side in SIDES}

    def batch(self, rows: Tensor, completion_mask: Tensor) -> Tensor:
        """[2B, T] values at the completion tokens of a batch of [chosen; rejected] rows, 0 elsewhere and in fillers."""
        filler = torch.zeros(1)
        values = [self._rows[side][row] if row >= 0 else filler for side in SIDES for row in rows.tolist()]
        result = torch.zeros(completion_mask.shape, device=completion_mask.device)
        result[completion_mask] = torch.cat(values).to(result)
        return result

    def sums(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[B] log-probabilities of the whole chosen and rejected completions, for losses that weigh no token."""
        chosen, rejected = (torch.stack([self._rows[side][row].sum() for row in rows.tolist()]) for side in SIDES)
        return chosen.to(rows.device), rejected.to(rows.device)

    @staticmethod
    def load(path: Path, pairs: Dataset, weights: str) -> "ReferenceLogps":
        """Read the file made of `pairs` (without fillers) by the weights of that hash.

        Raises:
            UserError: a torn file, or one of other weights, other pairs, or not one value a token.
        """
        expected = {"weights": weights, "pairs": pairs_hash(pairs)}
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                values = {side: file.get_tensor(side) for side in SIDES}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no whole file of reference log-probabilities ({error}); delete it") from None
        for key, value in expected.items():
            if found.get(key) != value:
                raise UserError(
                    f"{path}: made with other {key} ({found.get(key)}; this run's are {value})\n"
                    "delete it before a run's first step, or choose another output_dir"
                )
        lengths = {side: [len(ids) for ids in pairs[f"{side}_ids"]] for side in SIDES}
        for side in SIDES:
            if values[side].numel() != sum(lengths[side]) or not values[side].isfinite().all():
                raise UserError(f"{path}: {side!r} must hold one finite log-probability a token; delete the file")
        return ReferenceLogps(values, lengths)

    @staticmethod
    def save(path: Path, values: dict[str, list[Tensor]], pairs: Dataset, weights: str) -> None:
        """Write the rows' values, in the order of `pairs`; the file is whole or absent."""
        tensors = {side: torch.cat(values[side]).float().contiguous() for side in SIDES}
        with atomic.replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"weights": weights, "pairs": pairs_hash(pairs)})


def pairs_hash(pairs: Dataset) -> str:
    """Hash of the token ids of all pairs, in order."""
    digest = xxhash.xxh3_128()
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for ids in pairs[column]:
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()
