"""Named things that can be extended from outside: methods, models, tasks, laws, strategies.

A registry fills itself from three places, in this order: the built-in modules it was told of, the entry points that
installed packages declare (``isoflop.methods``, ``isoflop.models``, ``isoflop.tasks``, ``isoflop.laws``, ``isoflop.strategies``), and modules that a
sweep lists under ``import:``.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from isoflop.core.errors import UserError, unknown

T = TypeVar("T")
log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Registry(Generic[T]):
    """A mapping from public names to classes or objects of one kind.

    Args:
        kind: the word users see in messages ("method").
        builtin: modules whose import registers the built-in entries.
        group: of entry points; ``isoflop.<kind>s`` unless given.
    """

    def __init__(self, kind: str, builtin: tuple[str, ...] = (), group: str = "") -> None:
        self.kind = kind
        self._group = group or f"isoflop.{kind}s"
        self._builtin = builtin
        self._entries: dict[str, T] = {}
        self._loaded = False
        self._loading = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry and sets a class's ``name``. Re-registering a name by the same module and class replaces it (notebooks)."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{self.kind} name {name!r}: use lower-case letters, digits, '.', '_' and '-'")

        def add(entry: T) -> T:
            old = self._entries.get(name)
            if old is not None and _origin(old) != _origin(entry):
                raise UserError(f"{self.kind} {name!r} is registered twice: by {_origin(old)} and by {_origin(entry)}")
            if isinstance(entry, type):
                entry.name = name  # type: ignore[attr-defined]
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str, where: str = "") -> T:
        """The entry called ``name``; a UserError that names the nearest one otherwise."""
        self._load()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries, where)
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def own(self) -> list[str]:
        """Those that come with the registry's built-in modules, and with nothing else that happens to be imported."""
        rooms = tuple(f"{module}." for module in self._builtin)
        return [name for name in self.names() if _origin(self._entries[name]).startswith(rooms)]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _load(self) -> None:
        if self._loaded or self._loading:
            return
        self._loading = True
        try:
            for module in self._builtin:
                importlib.import_module(module)
            for point in entry_points(group=self._group):
                try:
                    entry = point.load()
                    if point.name not in self._entries:
                        self.register(point.name)(entry)
                except Exception as error:  # a broken plug-in must not take the others down
                    log.warning(
                        "%s %r of package entry point %s could not be loaded: %s",
                        self.kind,
                        point.name,
                        point.value,
                        error,
                    )
            self._loaded = True
        finally:
            self._loading = False


def _origin(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', type(entry).__qualname__)}"


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module below a package, so that a file put there registers itself.

    Modules whose names begin with an underscore are left to those who need them: they may want packages that are not there.

    Args:
        package: the package's ``__name__``.
        path: the package's ``__path__``.
    """
    for module in pkgutil.walk_packages(path, prefix=f"{package}."):
        if not module.name.rpartition(".")[2].startswith("_"):
            importlib.import_module(module.name)
