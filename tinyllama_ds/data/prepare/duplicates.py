"""Exact duplicates among up to a billion documents, by a hash of each, within and between sources and splits."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tinyllama_ds.data.order import splitmix64

_HASHED_TOGETHER = 2**16  # tokens; their intermediate results fit the processor's cache
_COMPARED_TOGETHER = 2**22  # hashes


def hash_documents(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """64 bits of each document (documents,) uint64, from tokens (n,) and the first token of each, and one past the last
    (documents + 1,): the sum of a hash of each token and its place in the document."""
    starts = starts.astype(np.int64)
    hashes = np.zeros(len(starts) - 1, dtype=np.uint64)
    filled = np.flatnonzero(np.diff(starts))  # documents may be empty
    boundaries = np.append(starts[filled], starts[-1])
    for start in range(0, len(tokens), _HASHED_TOGETHER):
        end = min(start + _HASHED_TOGETHER, len(tokens))
        first, last = np.searchsorted(boundaries, start, "right") - 1, np.searchsorted(boundaries, end, "left")
        here = np.maximum(boundaries[first:last], start) - start
        places = np.arange(start + 1, end + 1) - np.repeat(
            boundaries[first:last], np.diff(np.append(here, end - start))
        )
        mixed = splitmix64((places.astype(np.uint64) << np.uint64(32)) + tokens[start:end].astype(np.uint64))
        hashes[filled[first:last]] += np.add.reduceat(mixed, here)
    return hashes


def count_duplicates(groups: Mapping[str, Sequence[np.ndarray]]) -> dict[str, int]:
    """How many documents of each group are exact duplicates, and how many distinct ones each two groups share.

    `groups` holds sorted hashes, in any number of arrays. They are compared range by range, which needs little memory
    beyond the hashes themselves.
    """
    names = list(groups)
    repeated = np.zeros(len(names), dtype=np.int64)
    shared = np.zeros((len(names), len(names)), dtype=np.int64)
    for parts in _ranges([groups[name] for name in names]):
        distinct = [_distinct(part) for part in parts]
        repeated += [sum(map(len, part)) - len(found) for part, found in zip(parts, distinct, strict=True)]
        shared += _count_shared(distinct)
    counts = {name: int(count) for name, count in zip(names, repeated, strict=True)}
    for one, other in zip(*np.triu_indices(len(names), 1), strict=True):
        counts[f"{names[one]} and {names[other]}"] = int(shared[one, other])
    return counts


def _ranges(groups: Sequence[Sequence[np.ndarray]]) -> Iterator[list[list[np.ndarray]]]:
    """The hashes of each range, by group: views of the sorted arrays."""
    total = sum(len(hashes) for group in groups for hashes in group)
    bits = max(0, (total // _COMPARED_TOGETHER).bit_length())
    boundaries = (
        np.arange(1, 2**bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.empty(0, dtype=np.uint64)
    )
    cuts = [[[0, *np.searchsorted(hashes, boundaries), len(hashes)] for hashes in group] for group in groups]
    for number in range(2**bits):
        yield [
            [hashes[cut[number] : cut[number + 1]] for hashes, cut in zip(group, own, strict=True)]
            for group, own in zip(groups, cuts, strict=True)
        ]


def _distinct(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Each hash once, sorted; np.unique takes several times as long."""
    hashes = np.concatenate([*parts, np.empty(0, dtype=np.uint64)])
    hashes.sort()
    return hashes[np.diff(hashes, prepend=~hashes[:1]) != 0]


def _count_shared(groups: Sequence[np.ndarray]) -> np.ndarray:
    """How many hashes each two groups of distinct sorted hashes share (groups, groups)."""
    together = np.concatenate([*groups, np.empty(0, dtype=np.uint64)])
    together.sort()
    several = _distinct([together[1:][together[1:] == together[:-1]]])
    has_it = np.zeros((len(groups), len(several)))
    for row, hashes in zip(has_it, groups, strict=True):
        if len(hashes):
            row[:] = hashes[np.minimum(np.searchsorted(hashes, several), len(hashes) - 1)] == several
    return (has_it @ has_it.T).astype(np.int64)
