"""A results folder that is filled whole or not at all, and that never takes another's place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_distill.errors import SettingError

MARK = ".made-by-hf-distill-quickstart"
_UNFINISHED = ".unfinished-"


@contextmanager
def fill_folder(folder: Path, *, entries: Collection[str]) -> Iterator[Path]:
    """Yield an empty folder to work in; its `entries` move into `folder` when the block succeeds.

    When the block fails, what was in `folder` is untouched, and a folder made here is gone again.

    Raises `SettingError` when `folder` holds anything that such a block did not put there.
    """
    _check(folder, entries)
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for killed in folder.glob(f"{_UNFINISHED}*"):  # what a run left that was ended by force
            shutil.rmtree(killed)
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    except OSError as error:
        raise SettingError(f"output_dir {folder}: cannot be written ({error.strerror}). Choose another one.") from error
    try:
        yield work
        (folder / MARK).touch()
        for name in entries:
            _put_in_place(work / name, folder / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def _check(folder: Path, entries: Collection[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"output_dir {folder}: is a file. Give a folder, or a name not in use.")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(found if MARK not in found else found - {MARK, *entries})
    foreign = [name for name in foreign if not name.startswith(_UNFINISHED)]
    if foreign:
        raise SettingError(
            f"output_dir {folder}: holds files that the quickstart did not make "
            f"({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}). "
            "Give an empty or a new folder with --output-dir."
        )


def _put_in_place(new: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    os.replace(new, place)
