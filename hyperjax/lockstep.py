"""Work on several maps in step: what they are about to fit is fitted in one batch.

Each map's work is a call in a thread of its own, but only one of them runs at a time: until it
needs a fit, or ends. When all that are left need one, the batches of the same kind are joined,
fitted, and divided again. Nothing else of the work is shared, and its order is always the same.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Sequence

__all__ = ["fit_with_others", "in_step", "own_time"]

T = TypeVar("T")

_here = threading.local()


class _Wanted(NamedTuple):
    """A fit that a call waits for: `fit` takes a batch, which may be joined with others' of `key`.

    Batches and results are named tuples of arrays, whose first axes count the same problems.
    """

    key: Hashable
    fit: Callable[[Any], Any]
    batch: Any


class _Fitted(NamedTuple):
    """The result of a fit, or the exception that it raised, and its share of the time."""

    result: Any
    seconds: float


class _Abandoned(BaseException):
    """Nobody waits any more for what a call would return."""


class _Member(threading.Thread, Generic[T]):
    """A call that runs from fit to fit when it is told to."""

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._resumed, self._rests = threading.Semaphore(0), threading.Event()
        self._rests.set()
        self._fitted = _Fitted(None, 0.0)
        self.elsewhere = 0.0
        self.wanted: _Wanted | None = None
        self.result: T | None = None
        self.error: BaseException | None = None

    def advance(self, fitted: _Fitted) -> bool:
        """Go on, with what was fitted, to the next fit; whether there is one."""
        self.wanted, self._fitted = None, fitted
        self._rests.clear()
        if self.ident is None:
            self.start()
        else:
            self._resumed.release()
        self._rests.wait()
        return self.wanted is not None

    def abandon(self) -> None:
        """End at the next fit, and wait for that."""
        self._rests.wait()
        while self.wanted is not None:
            self.advance(_Fitted(_Abandoned(), 0.0))

    def run(self) -> None:
        """Work, in the thread."""
        _here.member = self
        try:
            self.result = self._call()
        except BaseException as error:  # raised again where the result is asked for
            self.error = error
        finally:
            self._rests.set()

    def wait_for(self, wanted: _Wanted) -> Any:
        """Wait for a fit, in the thread."""
        begin = time.perf_counter()
        self.wanted = wanted
        self._rests.set()
        self._resumed.acquire()
        result, seconds = self._fitted
        self.elsewhere += time.perf_counter() - begin - seconds
        if isinstance(result, BaseException):
            raise result
        return result

    def returned(self) -> T:
        """Return what the call returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


def in_step(calls: Sequence[Callable[[], T]]) -> Generator[T, None, None]:
    """Work on several calls in step, and yield what each returns, in the order in which they end.

    Parameters
    ----------
    calls
        Functions whose fits are joined. An exception of one is raised here and ends all.
    """
    members = [_Member(call) for call in calls]
    try:
        answers = dict.fromkeys(members, _Fitted(None, 0.0))
        while answers:
            waiting = []
            for member, fitted in answers.items():
                if member.advance(fitted):
                    waiting.append(member)
                else:
                    yield member.returned()
            answers = _fit_all(waiting)
    finally:
        for member in members:
            member.abandon()


def fit_with_others(key: Hashable, fit: Callable[[Any], Any], batch: Any) -> Any:
    """Fit a batch: at once, or in a call that works in step, joined with what others fit.

    Parameters
    ----------
    key
        Batches of equal keys may be joined, whoever's `fit` takes them.
    fit
        From a batch to a result.
    batch
        A named tuple of arrays (problem, ...); the result is another.
    """
    member = getattr(_here, "member", None)
    return fit(batch) if member is None else member.wait_for(_Wanted(key, fit, batch))


def own_time() -> float:
    """Return a time in seconds that passes while this call works, or fits, and not its others."""
    member = getattr(_here, "member", None)
    return time.perf_counter() - (0.0 if member is None else member.elsewhere)


def _fit_all(members: Sequence[_Member[T]]) -> dict[_Member[T], _Fitted]:
    """What each member waits for."""
    alike: dict[Hashable, list[_Member[T]]] = defaultdict(list)
    wanted = {member: member.wanted for member in members if member.wanted is not None}
    for member, each in wanted.items():
        alike[each.key].append(member)
    fitted: dict[_Member[T], _Fitted] = {}
    for some in alike.values():
        fitted |= dict(zip(some, _fit_alike([wanted[member] for member in some]), strict=True))
    return {member: fitted[member] for member in members}


def _fit_alike(wanted: Sequence[_Wanted]) -> list[_Fitted]:
    """Results of batches that can be joined, or the exceptions that each gives alone."""
    counts = [len(each.batch[0]) for each in wanted]
    begin = time.perf_counter()
    try:
        results = _divided(wanted[0].fit(_joined([each.batch for each in wanted])), counts)
    except Exception as error:
        if len(wanted) > 1:
            return [_fit_alike([each])[0] for each in wanted]
        results = [error]
    rate = (time.perf_counter() - begin) / sum(counts)
    return [_Fitted(result, rate * n) for result, n in zip(results, counts, strict=True)]


def _joined(batches: Sequence[Any]) -> Any:
    import numpy as np  # not before there is something to join: `hyperjax --help` has no need of it

    kind = type(batches[0])
    return kind(*(np.concatenate(leaves) for leaves in zip(*batches, strict=True)))


def _divided(result: Any, counts: Sequence[int]) -> list[Any]:
    import numpy as np

    ends = np.cumsum(counts)[:-1]
    leaves = [np.split(leaf, ends) for leaf in result]
    return [type(result)(*parts) for parts in zip(*leaves, strict=True)]
