"""What is written aside and renamed into place is whole or absent, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(part: Path, target: Path) -> None:
    """Give what was written and flushed as ``part`` its name, durably: a file replaces another, a folder none.

    Raises:
        OSError: as ``os.rename``; then ``part`` is where it was.
    """
    os.rename(part, target)
    sync(target.parent)
