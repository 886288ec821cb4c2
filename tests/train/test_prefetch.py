"""The thread that reads ahead loses no item, no exception and no thread."""

import threading

import pytest
from launching import TIMEOUT, wait_until

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.train.batches import prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_gives_the_same_items_and_ends():
    assert list(prefetch(iter(range(100)), 3)) == list(range(100))
    assert prefetch_threads() == []


def test_prefetch_works_ahead_but_no_further_than_its_depth():
    taken, lead = 0, []

    def items():
        for number in range(50):
            lead.append(number + 1 - taken)
            yield number

    ahead = prefetch(items(), 4)
    for number in range(40):
        assert next(ahead) == number
        taken = number + 1
        wait_until(lambda made=number + 5: len(lead) == made, "the one that was taken, and four ahead")
    assert max(lead) <= 5, "before what was taken is counted"
    ahead.close()
    assert prefetch_threads() == []


def test_prefetch_hands_over_the_exception_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ConfigError("shard: cut short")

    ahead = prefetch(items(), 1)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ConfigError, match="cut short"):
        next(ahead)
    assert prefetch_threads() == []


def test_prefetch_hides_the_reading_behind_the_work():
    """Each item is read between two questions for items, and never while the consumer waits."""
    working, read = threading.Semaphore(0), []

    def slow():
        for number in range(10):
            assert working.acquire(timeout=TIMEOUT)
            read.append(number)
            yield number

    ahead = prefetch(slow(), 4)
    working.release()
    assert next(ahead) == 0
    for number in range(1, 10):
        working.release()  # the training step
        wait_until(lambda last=number: read[-1] == last, "an item that is read meanwhile")
        assert next(ahead) == number
    ahead.close()
