"""FLOPs that a program does, counted from its jaxpr, and the fewest that a model's shapes require.

Matmuls alone are counted (a multiply and an add are two FLOPs); elementwise work is left out on both sides.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval

from mara_jax.policies.parameters import Architecture


def flops(function: Any, *args: Any, trips: Sequence[int] = (), **kwargs: Any) -> int:
    """FLOPs of the matmuls of one call, from the jaxpr: nothing is compiled or run.

    Loops of known length count as often as they run, a conditional as its most expensive branch, and recomputed
    activations are counted again.

    Args:
      function: a jitted function, or one that can be jitted; args, kwargs: of the call, arrays or their shapes.
      trips: how often each while loop that holds a matmul runs, in program order, an outer loop before its inner ones.

    Raises:
      ValueError: a while loop with a matmul without a number in `trips`, a number left over, or a primitive whose
        work cannot be read off its jaxpr.
    """
    staged = function if hasattr(function, "trace") else jax.jit(function)
    unused = list(trips)
    jaxpr = staged.trace(*args, **kwargs).jaxpr.jaxpr
    count = _of_jaxpr(_without_dead_code(jaxpr), unused)
    if unused:
        raise ValueError(f"trips={list(trips)}: the program has {len(trips) - len(unused)} while loops with a matmul")
    return count


def _without_dead_code(jaxpr: Any) -> Any:
    """A jaxpr without dead code, which a compiler leaves out, too: such as the gradients of kernels that an adapter
    leaves frozen."""
    rules, barrier = partial_eval.dce_rules, jax.lax.optimization_barrier_p
    usual = rules.get(barrier)
    rules[barrier] = _barrier_without_dead_code
    try:
        return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]
    finally:
        rules.pop(barrier) if usual is None else rules.update({barrier: usual})


def _barrier_without_dead_code(used: list[bool], barrier: Any) -> tuple[list[bool], Any]:
    """An optimization barrier on the arrays used after it: XLA drops the others, while JAX's own rule keeps all."""
    if not any(used):
        return used, None
    invars, outvars = (
        [x for x, kept in zip(xs, used, strict=True) if kept] for xs in (barrier.invars, barrier.outvars)
    )
    return used, barrier.replace(invars=invars, outvars=outvars)


def _of_jaxpr(jaxpr: Any, trips: list[int]) -> int:
    return sum(_of_equation(equation, trips) for equation in jaxpr.eqns)


def _of_equation(equation: Any, trips: list[int]) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_dot(equation)
    if (
        name == "pallas_call" and params["cost_estimate"] is not None
    ):  # its loops have unknown length: the caller states the cost
        return params["cost_estimate"].flops
    if name == "shard_map":
        return params["mesh"].size * _of_jaxpr(params["jaxpr"], trips)
    if name in ("conv_general_dilated", "ragged_dot", "ragged_dot_general", "pallas_call"):
        raise ValueError(f"{name} is not counted: its work is not in its jaxpr, or no model here has it")
    if name == "scan":
        return params["length"] * _of_jaxpr(params["jaxpr"].jaxpr, trips)
    if name == "while":
        return _of_while(params, trips)
    if name == "cond":
        return max(_of_jaxpr(branch.jaxpr, trips) for branch in params["branches"])
    return sum(_of_jaxpr(inner, trips) for inner in _inner(params))


def _of_dot(equation: Any) -> int:
    """Two FLOPs for each element of the result and each of the contracted positions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)


def _of_while(params: dict[str, Any], trips: list[int]) -> int:
    bodies = [params["body_jaxpr"].jaxpr, params["cond_jaxpr"].jaxpr]
    if not any(_has_dot(body) for body in bodies):
        return 0
    if not trips:
        raise ValueError("a while loop holds a matmul: give `trips`, how often each such loop runs, outer ones first")
    times = trips.pop(0)
    return times * sum(_of_jaxpr(body, trips) for body in bodies)


def _has_dot(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name == "dot_general" or any(_has_dot(inner) for inner in _inner(equation.params))
        for equation in jaxpr.eqns
    )


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters: bodies of jit, remat, custom derivatives, loops and branches."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


class Least(NamedTuple):
    """The fewest FLOPs that a step of a model can do, phase by phase."""

    rollout: int
    reference: int
    update: int


def layer_parameters(arch: Architecture) -> int:
    """Parameters of the layers' kernels, which every token meets once: no embedding, head, norm or bias."""
    attention = arch.embed * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    return arch.layers * (attention + 3 * arch.embed * arch.mlp)


def least(
    arch: Architecture,
    prompt_lengths_p: Any,
    lengths_pg: Any,
    *,
    exact_kl: bool = True,
    chunked: bool = False,
) -> Least:
    """The analytic least of rollout, reference and update, FLOPs.

    A token forward costs two FLOPs a kernel parameter, with its backward pass six; each prompt is computed once for its
    group, padding never, nothing twice. A completion's last token is read by nothing, and a group's first tokens come
    from one position, so the layers and the head both see each distinct position only once.

    Args:
      prompt_lengths_p, lengths_pg: tokens that count, the end token included.
      exact_kl: the update makes the reference's logits, too (forward only), for the exact KL: then the reference's
        pass needs no head of its own.
      chunked: the head's logits are made once more in the backward pass, for memory's sake.
    """
    prompt_p = np.asarray(prompt_lengths_p, np.int64)
    read_pg = np.asarray(lengths_pg, np.int64) - 1
    rows = int(prompt_p.sum() + read_pg.sum())
    layers = 2 * layer_parameters(arch) * rows + _attention(arch, prompt_p, read_pg)
    head = 2 * arch.embed * arch.vocab_size * int(prompt_p.size + read_pg.sum())
    return Least(
        rollout=layers + head,
        reference=layers + (0 if exact_kl else head),
        update=3 * layers + (3 + chunked + exact_kl) * head,
    )


def _attention(arch: Architecture, prompt_p: np.ndarray, read_pg: np.ndarray) -> int:
    """Scores and their mix of values: each query meets the keys up to itself, its prompt's among them."""
    in_prompts = prompt_p * (prompt_p + 1) // 2
    in_completions = read_pg * prompt_p[:, None] + read_pg * (read_pg + 1) // 2
    pairs = int(in_prompts.sum() + in_completions.sum())
    return 4 * arch.layers * arch.heads * arch.head_dim * pairs
