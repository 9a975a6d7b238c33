"""A Hugging Face cache that counts tokens and leaves keys and values to what sits in the attention hook."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SessionLayer(CacheLayerMixin):
    """One layer's part: it knows how many tokens have passed, so that positions go on, and holds none of them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is kept."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens and give them back; the occupant of attention adds them to what it keeps."""
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The logical length after ``query_length`` more tokens, and no offset."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget the count."""
        self.length = 0


class SessionCache(Cache):
    """As many session layers as the decoder asks for."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=SessionLayer)
