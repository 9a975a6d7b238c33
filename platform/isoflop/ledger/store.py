"""The store: a folder or any pyarrow/fsspec URI that holds sweeps, and the few file operations that all of it needs."""

from __future__ import annotations

import os
import posixpath
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import pyarrow.fs as pafs

from isoflop.core.errors import UserError


def default_store() -> str:
    """``$ISOFLOP_STORE``, else ``$XDG_DATA_HOME/isoflop``, else ``~/.local/share/isoflop``."""
    if "ISOFLOP_STORE" in os.environ:
        return os.environ["ISOFLOP_STORE"]
    return str(Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "isoflop")


@dataclass(frozen=True)
class Store:
    """Where sweeps are kept.

    Attributes:
        uri: as given: a path, ``file://``, ``s3://``, ``gs://``, ``hdfs://`` or any URI that fsspec knows.
        fs: file system; ``base`` is the root inside it.
    """

    uri: str
    fs: pafs.FileSystem
    base: str

    @classmethod
    def open(cls, uri: str | None = None) -> Store:
        """Open a store; UserError when the URI cannot be used."""
        given = str(uri or default_store())
        try:
            given.encode()
        except UnicodeEncodeError:
            raise UserError(f"store {given!r}: not UTF-8") from None
        scheme = urlparse(given).scheme
        try:
            if not scheme or len(scheme) == 1:
                path = os.path.abspath(os.path.expanduser(given))
                if odd := sorted(set(path) & set("?#%")):
                    raise UserError(
                        f"store {given!r}: a path with {odd[0]!r} cannot hold MLflow's database; name another"
                    )
                return cls(path, pafs.LocalFileSystem(), path)
            if scheme == "file":
                fs, path = pafs.FileSystem.from_uri(given)
                return cls(path, fs, path)
            return cls(given, *_remote(given, scheme))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"store {given!r} cannot be opened: {' '.join(str(error).split())}") from None

    @property
    def local(self) -> Path | None:
        """The folder, when the store is one on this host."""
        return Path(self.base) if isinstance(self.fs, pafs.LocalFileSystem) else None

    def path(self, *parts: str) -> str:
        """A path inside the file system."""
        return posixpath.join(self.base, *parts)

    def sweeps(self) -> list[str]:
        """Names of the sweeps in this store, sorted."""
        infos = self._list(self.path("sweeps"))
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.Directory)

    def read(self, path: str) -> bytes | None:
        """The content of a file, or None when there is none."""
        try:
            with self.fs.open_input_file(path) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Replace a file atomically; durable when this returns.

        On a local disk: a temporary file, fsync, rename, fsync of the folder. Object stores show an object only once
        its upload is complete.
        """
        try:
            if self.local is not None:
                _write_local(Path(path), data)
                return
            self.fs.create_dir(posixpath.dirname(path), recursive=True)
            with self.fs.open_output_stream(path) as stream:
                stream.write(data)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from error

    def names(self, folder: str, suffix: str) -> list[str]:
        """Base names of the files in ``folder`` that end with ``suffix``, sorted; hidden ones are left out."""
        found = (i.base_name for i in self._list(folder) if i.type == pafs.FileType.File)
        return sorted(n for n in found if n.endswith(suffix) and not n.startswith("."))

    def _list(self, folder: str) -> list[pafs.FileInfo]:
        try:
            return list(self.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True)))
        except OSError as error:
            raise StoreError(f"store {self.uri}: cannot list {folder}: {error.strerror or error}") from error


class StoreError(UserError):
    """The store cannot be written: disk full, no permission, network gone. What was committed before is safe."""


def _remote(uri: str, scheme: str) -> tuple[pafs.FileSystem, str]:
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
        return fs, path
    except Exception as native_error:
        import fsspec

        if scheme not in fsspec.available_protocols():
            raise UserError(
                f"store {uri!r}: unknown scheme {scheme!r}; allowed: a path, s3, gs, hdfs, abfs and what fsspec knows"
            ) from native_error
        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except ImportError as missing:
            raise UserError(f"store {uri!r}: {missing}") from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fd = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
