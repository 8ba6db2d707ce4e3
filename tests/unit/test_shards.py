"""Weight files: written as they come, read back whole, complete or absent."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.baichuan.checkpoints import check_weight_file
from finetune.baichuan.shards import HEADER_ROOM, ShardWriter, pick_tensors, staging
from finetune.errors import UserError

TENSORS = {
    "matrix": torch.randn(6, 4),
    "half": torch.randn(5, 7).bfloat16(),  # 70 bytes: what follows would not lie on a boundary of 4
    "blob": torch.arange(13, dtype=torch.uint8),
    "single": torch.tensor(3.5),
    "transposed": torch.randn(8, 4).t(),
    "eight": torch.randint(-128, 127, (4, 4), dtype=torch.int8),
    "double": torch.randn(3, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
}


def write(folder: Path, tensors: dict[str, torch.Tensor], size: int = 10**9) -> ShardWriter:
    writer = ShardWriter(folder, size)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    return writer


def test_any_tensors_come_back(tmp_path: Path) -> None:
    writer = write(tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    check_weight_file(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert writer.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_more_tensors_than_a_header_has_room_for(tmp_path: Path) -> None:
    names = [f"model.layers.{index}.some.long.name.of.a.tensor.weight" for index in range(1500)]
    write(tmp_path, {name: torch.full((2,), float(index)) for index, name in enumerate(names)})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert [float(found[name][0]) for name in names] == list(range(1500))
    assert all(file.stat().st_size < HEADER_ROOM + 8 + 1500 * 8 for file in files)


def test_picking_tensors(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, size=50)
    found = pick_tensors(tmp_path, ["matrix", "blob", "absent"])
    assert found.keys() == {"matrix", "blob"}
    assert torch.equal(found["matrix"], TENSORS["matrix"])


def test_everybody_may_read_what_is_written(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as folder:
        save_file({"a": torch.ones(2)}, folder / "own.safetensors")  # for the owner only
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub" / "file").touch(mode=0o600)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {"own.safetensors": 0o644, "sub": 0o755, "file": 0o644}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def fail(output: Path, error: BaseException, *, meanwhile: Path | None = None) -> None:
    """A writer that fails after its first file."""
    with staging(output) as folder:
        (folder / "file").touch()
        if meanwhile is not None:
            assert meanwhile.exists()
        raise error


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "out", KeyboardInterrupt())
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_writers_are_removed_but_not_folders_in_use(tmp_path: Path) -> None:
    abandoned = tmp_path / ".out.incomplete-abc"
    other = tmp_path / ".outside.incomplete-abc"
    for folder in (abandoned, other):
        folder.mkdir()
        (folder / "part-0").touch()
    with staging(tmp_path / "out") as first:
        assert not abandoned.exists()
        assert other.exists()
        with pytest.raises(ZeroDivisionError):
            fail(tmp_path / "out", ZeroDivisionError(), meanwhile=first)
        assert first.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".outside.incomplete-abc", "out"]


def test_output_that_appeared_meanwhile(tmp_path: Path) -> None:
    def write_both() -> None:
        with staging(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").touch()

    with pytest.raises(UserError, match="exists by now"):
        write_both()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_disk_that_fills_up(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full"):
        fail(tmp_path / "out", OSError(28, "No space left on device"))
    assert not list(tmp_path.iterdir())


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        fail(tmp_path / "file" / "out", ZeroDivisionError())
