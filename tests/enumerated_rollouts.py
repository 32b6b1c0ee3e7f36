"""Stored rollouts of five completions that can be enumerated: each policy draws every one as often as it should."""

import numpy as np

from mara_jax import config
from mara_jax.predict import stored_rollouts
from mara_jax.predict.prediction import Settings

# Five completions: the reference, rewards and answers; a run passes through the policies of its two steps.
REF = np.array([0.4, 0.2, 0.2, 0.1, 0.1])
REWARD = np.array([1.0, 1.0, 0.9, 0.2, 0.0])
ANSWER = np.array(["a", "b", "b", "c", None], object)
POLICIES = np.array([[0.4, 0.2, 0.2, 0.1, 0.1], [0.6, 0.1, 0.1, 0.1, 0.1]])
GROUP = 10  # completions: each policy draws every one as often as it should


def stored(algorithm: config.Algorithm | None = None, groups: int = 20, reference: bool = True, **changed):
    """`groups` groups of each policy, each the enumeration of that policy."""
    run = config.LanguageRun(algorithm=algorithm or config.Algorithm(method="vanilla", beta=0.5, threshold=0.8))
    index = np.stack([np.repeat(np.arange(5), np.rint(p * GROUP).astype(int)) for p in POLICIES]).repeat(groups, axis=0)
    step = np.arange(len(index)) // groups
    scores = stored_rollouts.ReferenceScores(REWARD[[0, 0, 1, 3]], ["a", "a", "b", None])
    return stored_rollouts.Stored(
        run,
        step + 1,
        np.zeros(len(index), int),
        {0: "prompt"},
        REWARD[index],
        ANSWER[index].tolist(),
        np.log(POLICIES[step[:, None], index]),
        np.log(REF[index]),
        np.ones(index.shape, bool),
        {0: scores} if reference else {},
    )._replace(**changed)


def settings(method="vanilla", kl="reverse", beta=0.5, threshold=0.8) -> Settings:
    return Settings(method, kl, beta, threshold)
