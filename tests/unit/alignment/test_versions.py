"""Versions of an adapter: what is added once, the link to the one in use, and weights that were changed behind it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignment import versions
from alignment.adapters import WEIGHTS
from alignment.errors import UserError
from alignment.fingerprint import weights_hash


def adapter(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"a": torch.full((3,), value)}, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_numbers_parents_and_the_link(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    assert versions.current(shelf) is None and versions.versions(shelf) == []
    first = versions.add(shelf, adapter(tmp_path / "a", 1), None, {"from": "a"})
    assert versions.current(shelf) is None, "added is not in use"
    versions.use(shelf, first)
    second = versions.add(shelf, adapter(tmp_path / "b", 2), first, {"from": "b"})
    assert versions.add(shelf, tmp_path / "b", first, {"from": "b again"}) == second, "killed behind it, added once"
    assert [(one.number, one.parent, one.facts["from"]) for one in versions.versions(shelf)] == [
        (1, None, "a"),
        (2, 1, "b"),
    ]
    assert versions.current(shelf) == first and weights_hash(shelf / "current") == weights_hash(tmp_path / "a")
    versions.use(shelf, second)
    assert (shelf / "current").resolve() == second.folder.resolve()
    assert versions.rollback(shelf) == first == versions.current(shelf)
    assert versions.rollback(shelf, 2) == second == versions.current(shelf)
    with pytest.raises(UserError, match="no version 3; there are: 1, 2"):
        versions.rollback(shelf, 3)
    assert versions.current(shelf) == second


def test_changed_weights_are_not_put_in_use(tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    first = versions.add(shelf, adapter(tmp_path / "a", 1), None, {"from": "a"})
    second = versions.add(shelf, adapter(tmp_path / "b", 2), first, {"from": "b"})
    versions.use(shelf, second)
    save_file({"a": torch.zeros(3)}, first.folder / WEIGHTS)
    with pytest.raises(UserError, match="001: the weights have been changed"):
        versions.rollback(shelf)
    assert versions.current(shelf) == second


def test_what_is_no_adapter_or_no_shelf(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an adapter folder: it has no adapter_model.safetensors"):
        versions.add(tmp_path / "shelf", tmp_path, None, {})
    with pytest.raises(UserError, match="no adapter is in use"):
        versions.rollback(tmp_path / "shelf")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        versions.rollback(tmp_path / "file")
