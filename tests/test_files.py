"""Files that appear complete or not at all."""

import os
from pathlib import Path

import pytest

from hyperjax.errors import OutputError
from hyperjax.files import atomic_path, write_together


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_makes_the_folder_and_keeps_the_suffix(tmp_path):
    target = tmp_path / "a" / "b" / "x.fits"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".fits"
        assert temporary.parent == target.parent
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names_in(target.parent) == ["x.fits"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_leaves_the_target_after_an_error(tmp_path, error):
    target = tmp_path / "x.txt"
    target.write_text("old")

    def interrupted():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("name", ["a.fits.gz", "a.b.png", ".hidden.txt"])
def test_the_temporary_name_has_the_ending_that_writers_know(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        temporary.touch()
        assert temporary.name.endswith({"a.fits.gz": ".fits.gz"}.get(name, Path(name).suffix))
        assert temporary.name.startswith(".hyperjax-")
    assert names_in(tmp_path) == [name]


def test_files_are_written_together_and_the_first_is_renamed_last(tmp_path, monkeypatch):
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (renamed.append(args[1].name), replace(*args)))
    targets = [tmp_path / name for name in ("a", "b", "c")]
    assert write_together({target: Path.touch for target in targets}) == targets
    assert renamed == ["c", "b", "a"]


def test_of_files_written_together_all_appear_or_none(tmp_path):
    def refuse(path):
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(OutputError, match=r"b: cannot be written \(No space left on device\)"):
        write_together({tmp_path / "a": Path.touch, tmp_path / "b": refuse})
    assert names_in(tmp_path) == []
