"""Compiled programs in parts, which XLA runs in the thread that calls them.

XLA takes the operations of a program, or of the body of a loop, from a queue of those that are
ready, and as soon as more than eight wait there it hands half of them to threads of its own pool.
So it does with copies of megabytes. Fits use the cores otherwise: each thread solves its own block
of problems, and lost a quarter of its time where it waited for the pool. A function that is kept
`apart` has a queue of its own, short where the function is short; `Packed` arguments keep it so.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

T = TypeVar("T")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["unpack"])
@dataclass(frozen=True)
class Packed(Generic[T]):
    """A tree in few arrays, of which `unpack` makes it; or a stack of such trees (leading axis)."""

    arrays: Any
    unpack: Callable[[Any], T]


def packed(tree: T) -> Packed[T]:
    """A tree of arrays in a single one, of the type that holds them all."""
    return Packed(*ravel_pytree(tree))


def apart(function: Callable[..., T]) -> Callable[..., T]:
    """The function, compiled as one that is called and not as a part of what calls it.

    Functions that it calls are parts of it again, unless they are kept apart as well. Arguments
    that are `Packed` are handed over as they are and unpacked inside.
    """

    @jax.jit
    def whole(*arguments: Any) -> T:
        with set_xla_metadata(inlineable="true"):
            return function(*(_unpacked(argument) for argument in arguments))

    def call(*arguments: Any) -> T:
        with set_xla_metadata(inlineable="false"):
            return cast(T, whole(*arguments))

    return call


def in_turns(
    function: Callable[..., T], rows: Any, at_once: int, count: Int[Array, ""] | None = None
) -> T:
    """What a function of one row gives for each row of a stack (leading axis), some `at_once`.

    So the arrays between its steps stay in the cache. Only the turns that reach the first `count`
    rows are taken (all, unless given); the other rows come back as zeros.
    """
    size = len(jax.tree.leaves(rows)[0])
    count = jnp.asarray(size) if count is None else count
    at_once = min(at_once, size)

    @apart
    def some(first: Int[Array, ""], rows: Any) -> T:
        taken = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, at_once), rows)
        return jax.vmap(function)(taken)

    shapes, structure = jax.tree.flatten(jax.eval_shape(some, jnp.asarray(0), rows))
    blank = [jnp.zeros((size, *leaf.shape[1:]), leaf.dtype) for leaf in shapes]

    def turn(part: Int[Array, ""], done: list[Array]) -> list[Array]:
        first = part * at_once
        new = jax.tree.leaves(some(first, rows))
        return [
            lax.dynamic_update_slice_in_dim(whole, leaf, first, 0)
            for whole, leaf in zip(done, new, strict=True)
        ]

    done = lax.fori_loop(0, (count + at_once - 1) // at_once, turn, blank)
    return cast(T, jax.tree.unflatten(structure, done))


def _unpacked(argument: Any) -> Any:
    return argument.unpack(argument.arrays) if isinstance(argument, Packed) else argument
