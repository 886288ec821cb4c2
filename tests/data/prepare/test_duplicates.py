"""Documents that are there twice: found whatever their length and wherever they lie, in little memory."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from tinyllama_ds.data.prepare import duplicates
from tinyllama_ds.data.prepare.duplicates import count_duplicates, hash_documents


def hash_all(documents: list[list[int]], dtype: type = np.uint16) -> list[int]:
    ends = np.cumsum([0, *map(len, documents)])
    return hash_documents(np.array(sum(documents, []), dtype=dtype), ends).tolist()


def test_equal_documents_have_equal_hashes_wherever_they_lie(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, size).tolist() for size in (1, 0, 300, 2, 7, 1000, 3, 1, 40)]
    whole = hash_all(documents)
    for together in (1, 7, 64, 2**16):
        monkeypatch.setattr(duplicates, "_HASHED_TOGETHER", together)
        assert hash_all(documents) == whole
        assert hash_all(documents[::-1]) == whole[::-1]
        assert hash_all(documents, np.int32) == whole


def test_documents_that_differ_have_other_hashes():
    base = [5, 6, 7, 2]
    others = [[6, 5, 7, 2], [5, 6, 2], [5, 6, 7, 2, 2], [5, 6, 8, 2], [0, *base], [*base, 0], [], [0], [0, 0]]
    assert len(set(hash_all([base, *others]))) == 1 + len(others)
    rng = np.random.default_rng(1)
    pairs = np.unique(rng.integers(0, 2**16, (200_000, 2)), axis=0)
    assert len(set(hash_documents(pairs.ravel(), np.arange(0, 2 * len(pairs) + 1, 2)).tolist())) == len(pairs)


def test_no_document_has_no_hash():
    assert hash_documents(np.empty(0, dtype=np.uint16), np.array([0])).tolist() == []


@pytest.mark.parametrize("together", [1, 50, 2**22])
def test_duplicates_are_those_of_sets(together: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(duplicates, "_COMPARED_TOGETHER", together)
    rng = np.random.default_rng(2)
    pool = rng.integers(0, 2**64, 300, dtype=np.uint64)
    pool[:2] = 0, 2**64 - 1
    groups = {
        name: [np.sort(rng.choice(pool, size)) for size in sizes]
        for name, sizes in {"a": (100, 0, 30), "b": (200,), "none": (), "c": (1, 1), "d": (150, 150)}.items()
    }
    values = {name: np.concatenate([*parts, np.empty(0, np.uint64)]).tolist() for name, parts in groups.items()}
    expected = {name: len(found) - len(set(found)) for name, found in values.items()}
    expected |= {f"{one} and {two}": len(set(values[one]) & set(values[two])) for one, two in combinations(values, 2)}
    assert count_duplicates(groups) == expected


def test_memory_is_little_beyond_the_hashes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(duplicates, "_COMPARED_TOGETHER", 2**15)
    rng = np.random.default_rng(3)
    groups = {name: [np.sort(rng.integers(0, 2**64, 2**20, dtype=np.uint64))] for name in "abc"}
    held = sum(part.nbytes for parts in groups.values() for part in parts)
    tracemalloc.start()
    count_duplicates(groups)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < held / 10
