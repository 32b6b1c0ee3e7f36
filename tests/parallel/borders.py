"""Where two runs drew different tokens: did the uniform lie where their cumulative probabilities differ?

The draw is made again, outside the decoding loop: logits by one forward pass over the tokens before, by the parameters
of either run, and the sampler's own random numbers and order of tokens; cumulative sums in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.sampling import draw


def probabilities(policy, params, prompt: list[int], completion: list[int]) -> np.ndarray:
    """Of every token at each place of a completion, the one after it included: float64 [t + 1, v]."""
    row = [*prompt, *completion]
    logits_tv = np.asarray(policy.logits(params, [row], [len(row)]), np.float64)[0, len(prompt) - 1 :]
    weight_tv = np.exp(logits_tv - logits_tv.max(-1, keepdims=True))
    return weight_tv / weight_tv.sum(-1, keepdims=True)


def levels(p_v: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative probabilities of blocks, and within a block, as `draw.draw_tokens` inverts them."""
    p_nk = np.pad(p_v, (0, -len(p_v) % draw.BLOCK)).reshape(-1, draw.BLOCK)
    return np.cumsum(p_nk.sum(-1)), np.cumsum(p_nk[block]) / p_nk[block].sum()


def explained(policy, params: tuple, prompt: list[int], rows: tuple, logps: tuple, key: jax.Array, sample: int) -> dict:
    """The first token in which a completion differs between two runs, and whether rounding explains it.

    Args:
      params, rows, logps: of either run: what it sampled with, the completion's tokens and its recorded log-probs.
      key: of the step's rollout.

    Returns:
      `position`; `uniform`; `places`: where the border between the two tokens lies in either run; `apart`: the largest
      difference of the two runs' cumulative probabilities there, and of a probability the sampler recorded from the one
      made again; `explained`: whether the uniform is at most that far from the border in both.
    """
    at = next(i for i, (a, b) in enumerate(zip(*rows, strict=True)) if a != b)
    p_rtv = [probabilities(policy, tree, prompt, list(rows[0][:at])) for tree in params]
    tokens = [row[at] for row in rows]
    blocks = [token // draw.BLOCK for token in tokens]
    level = int(blocks[0] == blocks[1])
    indices = [token % draw.BLOCK for token in tokens] if level else blocks
    cdf_rk = [levels(p_tv[at], blocks[0])[level] for p_tv in p_rtv]
    again = [p_tv[np.arange(at), rows[0][:at]] for p_tv in p_rtv]
    recorded = max((np.abs(np.exp(logp[:at]) - p_t).max(initial=0) for logp, p_t in zip(logps, again, strict=True)))
    apart = float(np.abs(cdf_rk[0] - cdf_rk[1]).max() + recorded)
    # The lower token was drawn because its cumulative probability passes the uniform, the upper one because that of
    # all tokens below it does not.
    places = [
        float(cdf_k[min(indices) if i == min(indices) else i - 1]) for cdf_k, i in zip(cdf_rk, indices, strict=True)
    ]
    keys_b = draw.token_keys(key, jnp.array([0]), jnp.array([sample]))
    uniform = float(jax.random.uniform(jax.random.fold_in(keys_b[0], at), (2,))[level])
    close = all(abs(uniform - place) <= apart for place in places)
    return {"position": at, "uniform": uniform, "places": places, "apart": apart, "explained": close}


def first_difference(policy, prompt: list[int], seed_key: jax.Array, one: dict, other: dict, snapshots: tuple) -> dict:
    """The first step whose tokens differ between two runs, and each differing completion explained.

    Args:
      seed_key: of all rollouts; one, other: tokens and log-probs of each step; snapshots: the parameters of either run
        before each step.
    """
    for step, tokens in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
        if tokens[0] == tokens[1]:
            continue
        key, params = jax.random.fold_in(seed_key, step), tuple(trees[step] for trees in snapshots)
        found = []
        for sample, rows in enumerate(zip(tokens[0][0], tokens[1][0], strict=True)):
            if rows[0] != rows[1]:
                logps = (one["logp"][step][0][sample], other["logp"][step][0][sample])
                found.append(explained(policy, params, prompt, rows, logps, key, sample) | {"sample": sample})
        return {"step": step, "rows": found}
    return {"step": len(one["tokens"]), "rows": []}
