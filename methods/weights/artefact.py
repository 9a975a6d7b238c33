"""A compressed model's matrices on disk and in memory, and serving them inside a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from isoflop.methods.weights.payloads import PAYLOADS, Payload
from isoflop.methods.weights.views import LinearView, replaceable
from isoflop.models.base import Model
from isoflop.models.hooks.occupant import Occupant

_TENSORS = "payloads.safetensors"
_INDEX = "payloads.json"


class Artefact:
    """Payloads of a model's views by name; from disk they are read one at a time.

    Args:
        payloads: by the view's name, or the folder to read them from.
        vectors: parameters outside the views that are served with other values (norms that scales are folded into), by
            parameter name. They stay dense.
        device: on which payloads from disk are laid.
    """

    def __init__(
        self, payloads: Mapping[str, Payload] | Path, vectors: Mapping[str, Tensor] | None = None, device: str = "cpu"
    ) -> None:
        self._payloads = payloads
        self._device = device
        self.vectors = dict(vectors or {})
        self._index: dict[str, dict[str, Any]] = {}
        if isinstance(payloads, Path):
            index = json.loads((payloads / _INDEX).read_text())
            self._index = index["views"]
            with self._file() as file:
                self.vectors = {name: file.get_tensor(f"vectors/{name}") for name in index["vectors"]}

    def __getitem__(self, name: str) -> Payload:
        """The payload of a view."""
        if not isinstance(self._payloads, Path):
            return self._payloads[name]
        entry = self._index[name]
        with self._file() as file:
            tensors = {part: file.get_tensor(f"{name}/{part}") for part in entry["tensors"]}
        return PAYLOADS[entry["kind"]].restore(entry["settings"], tensors)

    @property
    def names(self) -> list[str]:
        """The views."""
        return list(self._index if isinstance(self._payloads, Path) else self._payloads)

    def save(self, folder: Path) -> None:
        """Write everything into a folder."""
        from safetensors.torch import save_file

        tensors = {f"vectors/{name}": t for name, t in self.vectors.items()}
        views = {}
        for name in self.names:
            payload = self[name]
            parts = payload.tensors()
            tensors |= {f"{name}/{part}": t for part, t in parts.items()}
            views[name] = {"kind": payload.kind, "settings": payload.settings(), "tensors": list(parts)}
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / _TENSORS)
        (folder / _INDEX).write_text(json.dumps({"views": views, "vectors": list(self.vectors)}) + "\n")

    def _file(self) -> Any:
        from safetensors import safe_open

        assert isinstance(self._payloads, Path)
        return safe_open(self._payloads / _TENSORS, framework="pt", device=self._device)


@contextmanager
def in_place(model: Model, vectors: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters with other values inside the ``with`` block."""
    with replaceable(model, list(vectors)) as parameters:
        for name, value in vectors.items():
            parameters[name].data.copy_(value)
        yield


class Serving(Occupant):
    """Decoded payloads in a model's parameters, and their bytes; afterwards the model is what it was.

    Args:
        views: the matrices.
        payload_of: the payload of each.
        vectors: parameters outside the views with other values.
    """

    def __init__(
        self, views: list[LinearView], payload_of: Callable[[LinearView], Payload], vectors: Mapping[str, Tensor]
    ) -> None:
        self.views = views
        self._payload_of = payload_of
        self._vectors = vectors
        self._stored: dict[str, float] = {}

    def payload(self, view: LinearView) -> Payload:
        """What is stored of a matrix."""
        return self._payload_of(view)

    @property
    def stored(self) -> dict[str, float]:
        """Bytes of the payloads by the views' parameters, while they are served."""
        return self._stored

    @contextmanager
    def at_work(self, model: Model) -> Iterator[None]:
        """The decoded matrices in the parameters' place."""
        stored = dict.fromkeys((view.parameter for view in self.views), 0.0)
        with replaceable(model, list(stored)), in_place(model, self._vectors):
            for view in self.views:
                payload = self._payload_of(view)
                view.write(payload.decode())
                stored[view.parameter] += payload.nbytes(model.info.dense_bits)
            self._stored = stored
            try:
                yield
            finally:
                self._stored = {}
