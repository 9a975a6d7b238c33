"""The store: a folder or any pyarrow/fsspec URI that holds sweeps, and the few file operations that all of it needs."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.fs as pafs

from isoflop.core.errors import UserError
from isoflop.core.secrets import redacted
from isoflop.core.text import safe_line, safe_text
from isoflop.ledger.files import open_plain, read_plain, refuse_links, write_whole

_PAST = {"read": "read", "write": "written", "delete": "deleted from", "move": "tidied", "list": "listed"}
_NATIVE = ("s3", "gs", "gcs", "hdfs", "abfs", "abfss")  # of which pyarrow knows better what is wrong
_GS_SECONDS = 10
_ALLOWED = "a path, s3, gs, hdfs, abfs and what fsspec can write to"


def default_store() -> str:
    """``$ISOFLOP_STORE``, else ``$XDG_DATA_HOME/isoflop``, else ``~/.local/share/isoflop``."""
    if "ISOFLOP_STORE" in os.environ:
        return os.environ["ISOFLOP_STORE"]
    return str(Path(os.environ.get("XDG_DATA_HOME", "~/.local/share")).expanduser() / "isoflop")


@dataclass(frozen=True)
class Store:
    """Where sweeps are kept.

    Attributes:
        uri: as given: a path, ``file://``, ``s3://``, ``gs://``, ``hdfs://`` or any URI that fsspec knows. It may hold a
            password; people are shown :attr:`shown`.
        fs: file system; ``base`` is the root inside it.
    """

    uri: str = field(repr=False)
    fs: pafs.FileSystem = field(repr=False)
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
            if not scheme or (len(scheme) == 1 and "://" not in given):
                return cls._at(given)
            if scheme == "file":
                fs, path = pafs.FileSystem.from_uri(given)
                return cls(path, fs, path)
            return cls(given, *_remote(given, scheme))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"store {redacted(given)!r} cannot be opened: {safe_line(error)}") from None

    @classmethod
    def _at(cls, given: str) -> Store:
        path = os.path.abspath(os.path.expanduser(given))
        if odd := sorted(set(path) & set("?#%")):
            raise UserError(f"store {given!r}: a path with {odd[0]!r} cannot hold MLflow's database; name another")
        if safe_text(path, None) != path or "\n" in path:
            raise UserError(f"store {given!r}: a path must be text in UTF-8, without control characters")
        return cls(path, pafs.LocalFileSystem(), path)

    @property
    def shown(self) -> str:
        """The URI without the secrets in it."""
        return redacted(self.uri)

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
        with self._told("read", path):
            try:
                if self.local is not None:
                    return read_plain(Path(path))
                with self.fs.open_input_file(path) as file:
                    return bytes(file.read())
            except FileNotFoundError:
                return None

    def input(self, path: str) -> pa.NativeFile:
        """A file to be read in parts, from a remote store as a whole: a network that fails must not look like a torn file.

        Raises:
            FileNotFoundError: there is none (any more).
        """
        with self._told("read", path):
            file = self.fs.open_input_file(path)
            return file if self.local is not None else pa.BufferReader(file.read_buffer())

    def write(self, path: str, data: bytes, durable: bool = True) -> None:
        """Replace a file atomically; durable when this returns.

        On a local disk: a temporary file, fsync, rename, fsync of the folder. Object stores show an object only once
        its upload is complete.

        Args:
            durable: False where losing it in a power cut costs nothing.
        """
        with self._told("write", path):
            if self.local is not None:
                write_whole(self.inside(path), data, durable)
                return
            self.fs.create_dir(posixpath.dirname(path), recursive=True)
            with self.fs.open_output_stream(path) as stream:
                stream.write(data)

    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""
        with self._told("delete", path), contextlib.suppress(FileNotFoundError):
            self.inside(path)
            self.fs.delete_file(path)

    def move(self, path: str, folder: str) -> None:
        """Move a file into a folder, which is made where there is none."""
        target = f"{folder}/{posixpath.basename(path)}"
        with self._told("move", path):
            self.inside(path)
            self.inside(target)
            self.fs.create_dir(folder, recursive=True)
            self.fs.move(path, target)

    def open_plain(self, path: str, flags: int) -> int:
        """A descriptor of a plain file of a store on this host, made with its folders where ``flags`` say so."""
        with self._told("write", path):
            file = self.inside(path)
            file.parent.mkdir(parents=True, exist_ok=True)
            return open_plain(file, flags)

    def inside(self, path: str) -> Path:
        """The path, which no symbolic link leads out of the store. Raises OSError, or StoreError where the caller asks."""
        if self.local is not None:
            refuse_links(self.local, Path(path))
        return Path(path)

    def no_links(self, *parts: str) -> Path:
        """A path of a store on this host that others are to write to. Raises StoreError where a link is on its way."""
        with self._told("write", self.path(*parts)):
            return self.inside(self.path(*parts))

    @contextlib.contextmanager
    def _told(self, what: str, path: str) -> Iterator[None]:
        """Errors in one line: those of file systems far away are of every kind."""
        try:
            yield
        except (FileNotFoundError, UserError, MemoryError):
            raise
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
            at = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else path
            raise StoreError(
                f"store {self.shown} cannot be {_PAST[what]}: {safe_line(reason, 400)}: {safe_line(at)}"
            ) from error

    def names(self, folder: str, suffix: str) -> list[str]:
        """Base names of the files in ``folder`` that end with ``suffix``, sorted; hidden ones are left out."""
        found = (i.base_name for i in self._list(folder) if i.type == pafs.FileType.File)
        return sorted(n for n in found if n.endswith(suffix) and not n.startswith("."))

    def _list(self, folder: str) -> list[pafs.FileInfo]:
        with self._told("list", folder):
            return list(self.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True)))


class StoreError(UserError):
    """The store cannot be written: disk full, no permission, network gone. What was committed before is safe."""


def _remote(uri: str, scheme: str) -> tuple[pafs.FileSystem, str]:
    import fsspec

    if scheme in ("http", "https"):
        raise UserError(f"store {redacted(uri)!r}: nothing can be written to {scheme}; allowed: {_ALLOWED}")
    try:
        fs, path = pafs.FileSystem.from_uri(_with_patience(uri, scheme))
        return fs, path
    except Exception as native_error:
        if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
            raise UserError(
                f"store {redacted(uri)!r}: unknown scheme {scheme!r}; allowed: {_ALLOWED}"
            ) from native_error
        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except ImportError as missing:
            why = safe_line(native_error if scheme in _NATIVE else missing, 400)
            raise UserError(f"store {redacted(uri)!r} cannot be opened: {why}") from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def _with_patience(uri: str, scheme: str) -> str:
    """Google's client would try for a quarter of an hour where there is no network."""
    if scheme not in ("gs", "gcs") or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_GS_SECONDS}"
