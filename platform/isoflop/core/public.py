"""Public models and data sets that ``isoflop fetch`` has put into the cache: where they lie, and what names them.

``public:NAME`` is one of them, ``public:NAME/FILE`` a file of it. Naming one never fetches it: only ``isoflop fetch`` does.
"""

from __future__ import annotations

import os
from pathlib import Path

from isoflop.core.errors import UserError

PUBLIC = "public:"


_beside: Path | None = None


def look_beside(folder: Path | str | None) -> None:
    """From now on relative names of models are looked for in a folder first, then where the process runs.

    Args:
        folder: that of the sweep's YAML, where its paths of data lead, too; None for a sweep without a file.
    """
    global _beside
    _beside = None if folder is None else Path(folder)


def looked_at(name: str) -> list[Path]:
    """The places that a name of a user's own may stand for, in the order in which they are tried."""
    path = Path(name).expanduser()
    return [path] if _beside is None else [_beside / path, path]


def default_cache_dir() -> Path:
    """``$ISOFLOP_CACHE``, else ``$XDG_CACHE_HOME/isoflop``, else ``~/.cache/isoflop``."""
    if "ISOFLOP_CACHE" in os.environ:
        return Path(os.environ["ISOFLOP_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "isoflop"


def public_root() -> Path:
    """The folder with a folder for each that was fetched."""
    return default_cache_dir().absolute() / "public"


def local_path(name: str, where: str) -> Path:
    """The path that a user gave, from :func:`look_beside` on; or the place in the cache that ``public:…`` names.

    Args:
        where: what gave it, for messages ("data public:easy-vqa/test.jsonl").

    Raises:
        UserError: it has not been fetched, or what was fetched has no such file.
    """
    if not name.startswith(PUBLIC):
        return next((path for path in looked_at(name) if name and path.exists()), Path(name).expanduser())
    source, _, rest = name.removeprefix(PUBLIC).partition("/")
    folder = public_root() / source
    if source in ("", ".", "..") or not folder.is_dir():
        wanted = source or "NAME"
        raise UserError(f"{where}: {wanted} is not in {public_root()}; get it with: isoflop fetch {wanted}")
    path = folder / rest
    if not path.exists() or ".." in Path(rest).parts:
        held = ", ".join(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
        raise UserError(f"{where}: {source} has no {rest}; it has: {held}")
    return path
