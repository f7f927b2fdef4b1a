"""Random numbers that belong to a thing, not to a moment: every draw has a key, such as (seed, "noise", epoch, sample).

A number that is keyed by its sample is the same on one process and on eight, in any order of batches, and after a
restart: nothing about generators has to be saved or gathered.
"""

import hashlib

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU whose stream depends on the key alone.

    Examples:
        >>> first, again = (torch.rand(1, generator=keyed_generator(0, "noise", 3)) for _ in range(2))
        >>> bool(first == again)
        True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(shape: tuple[int, ...], keys: list[Key], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers ``[len(keys), *shape]``, one row per key; drawn in float32, so that dtypes agree."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key)) for key in keys]).to(dtype)
