"""A policy made by hand that answers the 1-2 task: it follows a chain of tokens, and its layers add a little noise.

So a run has rewards, answers and lengths that vary from its first step on, without a warm-up.
"""

import pathlib

import numpy as np

from mara_jax import hf
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import parameters, transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks import onetwo

# What follows what, with which probability; the first is the prompt's last token, the last one ends.
PIECES = ("<think>", "I pick", " at random.", "</think><answer>", "1", "2", "</answer>")
CHAIN = {
    "Ċ": {"<think>": 1.0},
    "<think>": {"I pick": 0.7, " at random.": 0.3},
    "I pick": {" at random.": 0.6, "</think><answer>": 0.2, "</answer>": 0.2},
    " at random.": {"</think><answer>": 0.6, "I pick": 0.4},
    "</think><answer>": {"1": 0.7, "2": 0.3},
    "1": {"</answer>": 1.0},
    "2": {"</answer>": 1.0},
    "</answer>": {"<|im_end|>": 1.0},
}
VOCABULARY, EMBED = 520, 64


def write(out: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A directory that policy.weights may name."""
    tokenizer = tokenizers.nano([onetwo.PROMPT], 512)
    tokenizer.add_tokens(list(PIECES))
    arch = transformer.Architecture(
        family="qwen2", vocab_size=VOCABULARY, embed=EMBED, layers=1, heads=4, kv_heads=2, head_dim=16, mlp=128,
        tie_embeddings=False, max_positions=512,
    )  # fmt: skip
    draw = np.random.default_rng(seed)
    tree: dict = {}
    for path, (shape, _) in parameters.leaf_shapes(arch).items():
        scale = np.ones(shape) if path[-1] == "scale" else 0.05 * draw.standard_normal(shape)
        parameters.put(tree, path, scale.astype(np.float32))
    number = {name: tokenizer.convert_tokens_to_ids(name) for name in CHAIN}
    for channel, (name, after) in enumerate(CHAIN.items()):
        tree["embed"]["embedding"][number[name]] = 8 * np.eye(EMBED)[channel]
        for following, share in after.items():
            row = tokenizer.convert_tokens_to_ids(following)
            # The final norm makes the one channel EMBED ** .5; 12 nats are far above 520 other tokens.
            tree["head"]["embedding"][row, channel] = (12 + np.log(share)) / EMBED**0.5
    ends = tokenizers.end_tokens(tokenizer)
    return hf.export(Policy(arch, tokenizer, ends, ends[0], {}, "small"), tree, out)
