"""Orthogonal Hadamard matrices, which spread a few large entries of a vector over all of them.

Sizes are powers of two (Sylvester's construction) times 1 or a size of Paley's: q + 1 for primes q that leave 3 when divided by 4, and
2(q + 1) for those that leave 1. Where several would do, the power of two is the largest.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LARGEST_CORE = 1024
"""Largest size that is built by Paley's construction."""


def has_hadamard(size: int) -> bool:
    """Whether ``hadamard`` builds a matrix of this size."""
    return _core_of(size) is not None


@lru_cache(maxsize=32)
def hadamard(size: int) -> Tensor:
    """H with H Hᵀ = 1, (size, size) in float32; all entries have the same magnitude.

    Raises:
        ValueError: none of this size is known here.
    """
    core = _core_of(size)
    if core is None:
        raise ValueError(f"no Hadamard matrix of size {size} is known here")
    matrix = torch.ones(1, 1) if core == 1 else _paley(core)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix / size**0.5


def _core_of(size: int) -> int | None:
    """The smallest size from which doubling reaches ``size``: 1, or one of Paley's."""
    found, rest = None, size
    while rest >= 1 and rest == int(rest):
        if rest == 1 or (rest <= LARGEST_CORE and _field(rest) is not None):
            found = rest
        if rest % 2:
            break
        rest //= 2
    return found


def _field(size: int) -> tuple[int, bool] | None:
    """The prime of Paley's construction and whether it is the doubled one; None where there is none."""
    if size % 4 == 0 and _is_prime(size - 1) and (size - 1) % 4 == 3:
        return size - 1, False
    if size % 4 == 0 and _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return size // 2 - 1, True
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _paley(size: int) -> Tensor:
    """Of entries 1 and -1."""
    field = _field(size)
    assert field is not None
    prime, doubled = field
    squares = {n * n % prime for n in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if n in squares else -1.0 for n in range(1, prime)])
    places = torch.arange(prime)
    residues = character[(places[:, None] - places[None]) % prime]
    ones = torch.ones(prime)
    if not doubled:
        skew = torch.zeros(size, size)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = ones, -ones, residues
        return skew + torch.eye(size)
    even = torch.zeros(prime + 1, prime + 1)
    even[0, 1:], even[1:, 0], even[1:, 1:] = ones, ones, residues
    pair, on_diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(even, pair) + torch.kron(torch.eye(prime + 1), on_diagonal)
