"""Files of a store on this host, which somebody else may have made: plain files only, and no way out of the store.

A symbolic link inside a store would send what is written to wherever its maker wanted, and a pipe would keep a reader
waiting for ever. Links on the way to the store are the user's own and are followed.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from pathlib import Path

from isoflop.core.files import put_in_place


def refuse_links(base: Path, path: Path) -> None:
    """Raise OSError when ``path``, or a folder between it and ``base``, is a symbolic link."""
    for part in [path, *path.parents]:
        if part == base or base not in part.parents:
            return
        if part.is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link inside a store, through which nothing is written", str(part))


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of a plain file; links, pipes and devices are refused at once.

    Args:
        flags: of ``os.open``.

    Raises:
        OSError: as ``os.open``, and for what is no plain file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe that nobody reads
            raise OSError(errno.EINVAL, "no plain file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return descriptor


def read_plain(path: Path) -> bytes:
    """The content of a plain file, or of one that a link leads to."""
    with os.fdopen(open_plain(path.resolve(), os.O_RDONLY), "rb") as file:
        return file.read()


def write_whole(target: Path, data: bytes, durable: bool = True) -> None:
    """Replace a file in one step: written beside it, flushed to the disk when ``durable``, renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        with os.fdopen(open_plain(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if durable:
            put_in_place(part, target)
        else:
            os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
