"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError, with the reason, if no file can be made in the folder that ``path`` is, or will be, in."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {folder}: {error.strerror}") from None


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside ``path``, not there yet, to write a file or a directory to. At the end of the ``with`` block it
    takes the place of ``path``; if the block fails, nothing is left of it. Its name ends as that of ``path`` does.

    Raises:
        OSError: if what was written cannot take the place of ``path``, such as a directory that of a full one.
    """
    path = Path(path).absolute()
    beside = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
