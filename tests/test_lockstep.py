"""Work in step: against the same work done one after the other."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from hyperjax.lockstep import fit_with_others, in_step, own_time
from hyperjax.logs import log_file


class Numbers(NamedTuple):
    values: NDArray[np.float64]


class Doubler:
    """A fit that doubles numbers, none of which may be NaN, and remembers how many it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, batch: Numbers) -> Numbers:
        if np.isnan(batch.values).any():
            raise ValueError("NaN")
        self.given.append(len(batch.values))
        self.threads.add(threading.get_ident())
        return Numbers(2 * batch.values)


def chain(
    fit: Any, start: NDArray[np.float64], times: int, key: str = "k"
) -> Callable[[], NDArray[np.float64]]:
    def call() -> NDArray[np.float64]:
        values = start
        for _ in range(times):
            values = fit_with_others(key, fit, Numbers(values)).values
        return values

    return call


def test_outside_a_fit_is_made_at_once() -> None:
    fit = Doubler()
    assert_array_equal(chain(fit, np.array([1.0, 2.0]), 2)(), [4.0, 8.0])
    assert fit.given == [2, 2]


def test_fits_of_one_key_are_joined_and_divided() -> None:
    """Calls that end later go on without those that have ended; results come as calls end."""
    fit = Doubler()
    starts, times = [np.arange(3.0), np.arange(5.0) + 10, np.arange(1.0) + 100], [3, 1, 2]
    calls = [chain(fit, start, n) for start, n in zip(starts, times, strict=True)]
    results = list(in_step(calls))
    assert fit.given == [3 + 5 + 1, 3 + 1, 3]
    assert fit.threads == {threading.get_ident()}
    for which, result in zip((1, 2, 0), results, strict=True):
        assert_array_equal(result, starts[which] * 2 ** times[which])


def test_fits_of_other_keys_are_apart() -> None:
    fit = Doubler()
    list(in_step([chain(fit, np.zeros(2), 1, "a"), chain(fit, np.zeros(3), 1, "b")]))
    assert sorted(fit.given) == [2, 3]


def test_a_wrong_batch_is_that_of_its_own_call() -> None:
    fit = Doubler()
    told: list[str] = []

    def careful(start: NDArray[np.float64]) -> NDArray[np.float64] | None:
        try:
            return chain(fit, start, 1)()
        except ValueError as error:
            told.append(f"{error} in {start[0]}")
            return None

    starts = [np.array([1.0]), np.array([3.0, np.nan]), np.array([5.0])]
    results = list(in_step([lambda s=s: careful(s) for s in starts]))
    assert told == ["NaN in 3.0"]
    assert results[1] is None
    assert_array_equal(results[0], [2.0])
    assert_array_equal(results[2], [10.0])


def test_one_call_runs_at_a_time_and_in_order() -> None:
    events: list[str] = []

    def call(name: str) -> None:
        for step in range(2):
            events.append(f"{name}{step} begins")
            threading.Event().wait(0.01)
            events.append(f"{name}{step} ends")
            fit_with_others(0, Doubler(), Numbers(np.zeros(1)))

    list(in_step([lambda: call("a"), lambda: call("b")]))
    assert events == [f"{n}{s} {what}" for s in "01" for n in "ab" for what in ("begins", "ends")]


def test_an_exception_of_a_call_is_raised_and_ends_the_others() -> None:
    ended: list[bool] = []

    def waits() -> None:
        try:
            fit_with_others(0, Doubler(), Numbers(np.zeros(1)))
        finally:
            ended.append(True)

    def fails() -> None:
        raise RuntimeError("mine")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="mine"):
        list(in_step([waits, fails, waits]))
    assert ended == [True]  # the third was not begun
    assert threading.active_count() == before


def test_time_of_others_is_not_ones_own() -> None:
    spent = {}

    def call(name: str, seconds: float) -> None:
        begin = own_time()
        for _ in range(2):
            threading.Event().wait(seconds)
            fit_with_others(0, Doubler(), Numbers(np.zeros(1)))
        spent[name] = own_time() - begin

    list(in_step([lambda: call("quick", 0.0), lambda: call("slow", 0.2)]))
    assert spent["quick"] < 0.1
    assert spent["slow"] > 0.4


def test_a_log_has_the_lines_of_its_own_call(tmp_path: Path) -> None:
    """All of them, also those after the first call has ended."""
    steps = {"a": 1, "b": 3, "c": 2}
    logger = logging.getLogger("hyperjax")
    before = logger.level

    def call(name: str) -> None:
        log = log_file(tmp_path / name, thread=threading.get_ident())
        with log as begin:
            begin()
            for step in range(steps[name]):
                logging.getLogger("hyperjax.test").info("%s %d", name, step)
                fit_with_others(0, Doubler(), Numbers(np.zeros(1)))

    list(in_step([lambda n=name: call(n) for name in steps]))
    for name, count in steps.items():
        lines = (tmp_path / name).read_text().splitlines()
        assert [line.split(": ")[-1] for line in lines] == [f"{name} {n}" for n in range(count)]
    assert logger.level == before
