"""How fast a step's phases are, against what the machine gives a plain matmul and a plain copy in the same process."""

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.bench import phases
from mara_jax.policies import parameters
from mara_jax.policies.parameters import Architecture
from mara_jax.sampling import rollout
from mara_jax.train import loop, memory
from mara_jax.train.compilations import Compilations
from mara_jax.train.setup import Setup
from mara_jax.train.state import BySampler, State

COPY_BYTES = 256 * 2**20


def clock() -> float:
    """CPU seconds of the process where the CPU computes, else seconds."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def measure(name: str, setup: Setup, repeats: int) -> dict[str, Any]:
    """Everything `python -m mara_jax.bench` reports of a case, as one flat-keyed record per phase.

    Args:
      name: of the case.
      setup: its policy, prompts and sizes, from `phases.setup_of`.
      repeats: timed runs of each phase after one that compiles; medians are reported.
    """
    completions, batches, spent, compiled, peaks, machine = steps(setup, repeats, machine=True)
    counts = phases.counted(setup, completions, batches), phases.least(setup, completions)
    del batches
    record = {
        "case": name,
        "backend": jax.default_backend(),
        "clock": "cpu_s" if jax.default_backend() == "cpu" else "s",
        "shape": _shape(setup, completions),
        "machine": machine,
        "phases": _phases(spent, counts, completions, machine),
        "decode": _decode(setup, completions, statistics.median(spent["rollout"]), machine),
        "compiled": compiled,
        "memory": peaks,
    }
    record["phases"]["step"] = {"seconds": sum(statistics.median(times) for times in spent.values())}
    return record


class Steps(NamedTuple):
    """Timed steps: the last rollout and batches; by phase every repeat's seconds; compilations, peak memory (MiB),
    and what the machine gave plain work between the steps."""

    completions: rollout.Rollout
    batches: BySampler
    spent: dict[str, list[float]]
    compiled: dict[str, dict[str, float]]
    memory: dict[str, float]
    machine: dict[str, float]


def steps(setup: Setup, repeats: int, machine: bool = False) -> Steps:
    """One step that compiles, then `repeats` that are timed; machine: each beside plain matmuls and a copy."""
    compilations = Compilations()
    with compilations.counted() as warm_up:
        state, completions, batches, _ = _step(setup, phases.fresh_state(setup), 0)
    first = peak_mib()
    memory.give_back()  # as the training loop does
    spent: dict[str, list[float]] = {name: [] for name in phases.NAMES}
    afterwards, peak, plain = {"programs": 0, "seconds": 0.0}, first, None
    for repeat in range(1, repeats + 1):
        with compilations.counted() as more:
            state, completions, batches, times = _step(setup, state, repeat)
        afterwards = {name: count + more[name] for name, count in afterwards.items()}
        for name, seconds in zip(phases.NAMES, times, strict=True):
            spent[name].append(seconds)
        if plain is None:
            peak = max(peak, peak_mib())  # of steps, not of what they are compared with
            if machine:
                size = int(np.size(completions.lengths))
                plain = Plain(setup.policy.architecture, setup.ref_params, _rows(completions), size)
        if plain is not None:
            plain.time()
    peaks = {"peak_mib": peak, "first_step_mib": first}
    compiled = {"warm_up": warm_up, "afterwards": afterwards}
    rates = {} if plain is None else plain.rates()
    return Steps(completions, batches, spent, compiled, peaks, rates)


def _step(setup: Setup, state: State, seed: int):
    marks = [clock()]
    completions = phases.sample_completions(setup, state.params, seed)
    marks.append(clock())
    batches = phases.score_completions(setup, completions)
    marks.append(clock())
    if seed == 0:
        loop.compile_update(setup, state, batches)
    state = phases.update(setup, state, batches)
    marks.append(clock())
    return state, completions, batches, np.diff(marks).tolist()


def _rows(completions: rollout.Rollout) -> int:
    """Tokens that a forward pass reads: prompts once, and completions but for their last token."""
    return int(np.sum(completions.prompt_lengths) + np.sum(np.asarray(completions.lengths) - 1))


def _shape(setup: Setup, completions: rollout.Rollout) -> dict[str, Any]:
    lengths = np.asarray(completions.lengths)
    return {
        "prompts": len(setup.prompts),
        "prompt_tokens": int(np.sum(completions.prompt_lengths)),
        "group": setup.cfg.rollout.group_size,
        "samples": int(lengths.size),
        "max_new_tokens": setup.cfg.rollout.max_new_tokens,
        "new_tokens": int(lengths.sum()),
        "parameters": parameters.count(setup.policy.architecture),
    }


def _phases(spent, counts, completions: rollout.Rollout, machine: dict[str, float]) -> dict[str, Any]:
    """For each phase: seconds, tokens/s (generated; then read by the model), FLOPs against the least, GFLOP/s, and that
    against plain matmuls: decoding's have few rows, and are compared with such."""
    counted, least = counts
    generated = int(np.sum(completions.lengths))
    rows = {}
    for name, tokens in zip(phases.NAMES, (generated, _rows(completions), _rows(completions)), strict=True):
        seconds, flops = statistics.median(spent[name]), getattr(counted, name)
        plain = machine["matmul_decode_gflops_per_s" if name == "rollout" else "matmul_gflops_per_s"]
        rows[name] = {
            "seconds": seconds,
            "all_seconds": spent[name],
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "flops": flops,
            "flops_least": getattr(least, name),
            "flops_over_least": flops / getattr(least, name),
            "gflops_per_s": flops / seconds / 1e9,
            "of_matmul": flops / seconds / 1e9 / plain,
        }
    return rows


def _decode(setup: Setup, completions: rollout.Rollout, seconds: float, machine) -> dict[str, float]:
    """Bytes that each step of decoding must read at least, over its time: weights once, the keys and values seen."""
    arch = setup.policy.architecture
    steps = int(np.max(completions.lengths)) - 1
    if not steps:
        return {"steps": 0}
    prefill = jax.jit(rollout.prefill, static_argnums=0)
    prefill_s = timed(lambda: prefill(arch, setup.ref_params, completions.prompt_tokens, completions.prompt_lengths), 3)
    each = max(seconds - prefill_s, 1e-9) / steps
    width = jnp.dtype(arch.compute_dtype).itemsize
    weights = (parameters.count(arch) - (0 if arch.tie_embeddings else arch.vocab_size * arch.embed)) * width
    lengths = np.asarray(completions.lengths)
    own = np.sum(lengths * (lengths - 1) / 2) / steps  # slots read in a mean step, over all rows
    cache = 2 * arch.layers * arch.kv_heads * arch.head_dim * width * (float(np.sum(completions.prompt_lengths)) + own)
    rate = (weights + cache) / each / 1e9
    return {
        "steps": steps,
        "prefill_seconds": prefill_s,
        "seconds_per_step": each,
        "bytes_per_step": weights + cache,
        "gbytes_per_s": rate,
        "of_copy": rate / machine["copy_gbytes_per_s"],
    }


class Plain:
    """What this process gets from plain matmuls of the model's own shapes, and from a copy, timed between steps: a
    shared machine's speed drifts.

    Of `rates`, matmul_gflops_per_s: `rows` tokens through every kernel of one layer and through the head, forward only;
    matmul_decode_gflops_per_s: `samples` rows through those of all layers; copy_gbytes_per_s: read and written.
    """

    def __init__(self, arch: Architecture, params: Any, rows: int, samples: int) -> None:
        dtype = jnp.dtype(arch.compute_dtype)
        head = params["embed" if arch.tie_embeddings else "head"]["embedding"].astype(dtype)
        inner, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        shapes = [(arch.embed, inner), (inner, arch.embed), *[(arch.embed, keys)] * 2]
        shapes += [(arch.embed, arch.mlp)] * 2 + [(arch.mlp, arch.embed)]
        key = jax.random.key(0)
        layers = [[jax.random.normal(key, shape, dtype) for shape in shapes] for _ in range(arch.layers)]

        def all_of(kernels, x_by_width, head):
            logits = jax.lax.dot_general(x_by_width[arch.embed], head, (((1,), (1,)), ((), ())))
            return [x_by_width[w.shape[0]] @ w for w in kernels], logits

        multiply, copy = jax.jit(all_of), jax.jit(jnp.copy)
        self.work: dict[str, tuple[Callable[[], Any], float]] = {}
        for name, count, kernels in (
            ("matmul_gflops_per_s", rows, layers[0]),
            ("matmul_decode_gflops_per_s", samples, [w for layer in layers for w in layer]),
        ):
            inputs = {width: jax.random.normal(key, (count, width), dtype) for width in {s[0] for s in shapes}}
            program = functools.partial(multiply, kernels, inputs, head)
            self.work[name] = (program, 2 * count * (sum(w.size for w in kernels) + head.size))
        source = jnp.ones(COPY_BYTES // 4)
        self.work["copy_gbytes_per_s"] = (functools.partial(copy, source), 2 * COPY_BYTES)
        self.spent: dict[str, list[float]] = {name: [] for name in self.work}
        for run, _ in self.work.values():
            jax.block_until_ready(run())

    def time(self, repeats: int = 3) -> None:
        """Does each a few times more."""
        for name, (run, _) in self.work.items():
            for _ in range(repeats):
                start = clock()
                jax.block_until_ready(run())
                self.spent[name].append(clock() - start)

    def rates(self) -> dict[str, float]:
        """By the median time of each."""
        return {name: amount / statistics.median(self.spent[name]) / 1e9 for name, (_, amount) in self.work.items()}


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds (see `clock`) of a call that was made once before."""
    jax.block_until_ready(run())
    spent = []
    for _ in range(repeats):
        start = clock()
        jax.block_until_ready(run())
        spent.append(clock() - start)
    return statistics.median(spent)


def peak_mib() -> float:
    """Most memory this process, or the accelerator, has held at once so far, MiB."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its peak survives exec, so that a process started by a larger one looks large.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
