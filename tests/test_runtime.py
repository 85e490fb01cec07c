"""Work divided over threads."""

import threading

import pytest
from threadpoolctl import threadpool_info

from hyperjax.runtime import at_once


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    assert at_once(lambda item: item**2, range(7), threads) == [i**2 for i in range(7)]


def test_as_many_items_as_threads_are_worked_on_at_once() -> None:
    both = threading.Barrier(2, timeout=60)  # breaks unless two are there
    assert sorted(at_once(lambda _: both.wait(), range(2), 2)) == [0, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_is_raised(threads: int) -> None:
    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        at_once(fail, range(4), threads)


def test_nothing_makes_nothing() -> None:
    assert at_once(str, [], 2) == []


def test_linear_algebra_has_no_threads_of_its_own() -> None:
    """After `configure_runtime` (conftest), those of numpy and of scipy, which jax calls."""
    libraries = [one for one in threadpool_info() if one["user_api"] == "blas"]
    assert libraries
    assert {one["num_threads"] for one in libraries} == {1}
