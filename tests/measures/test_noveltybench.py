"""NoveltyBench's measures by hand."""

import numpy as np
import pytest

from mara_jax.measures import equivalence, noveltybench


def test_distinct_by_hand():
    assert [noveltybench.distinct_k([0, 0, 1, 2, 1], k) for k in range(1, 6)] == [1, 1, 2, 3, 3]


def test_utility_by_hand():
    """p = .5: (1 - .5) / (1 - 1/8) = 4/7 of 4 + .5 * 0 + .25 * 8."""
    assert noveltybench.utility_k([0, 0, 1], [4, 9, 8], 3, patience=0.5) == pytest.approx(4 / 7 * 6)
    assert noveltybench.utility_k([0, 0, 1], [4, 9, 8], 1, patience=0.5) == 4
    # The published patience, ten completions that are all different and worth 10, or all the same.
    assert noveltybench.utility_k(range(10), [10] * 10, 10) == pytest.approx(10)
    assert noveltybench.utility_k([0] * 10, [10] * 10, 10) == pytest.approx(10 * 0.2 / (1 - 0.8**10))
    assert noveltybench.utility_k([0, 1], [3, 7], 2, patience=0) == 3
    assert noveltybench.utility_k([0, 1, 0], [3, 6, 9], 3, patience=1) == 3  # (3 + 6 + 0) / 3


def test_utility_is_what_a_reader_who_may_stop_sees():
    """E(sum of what is read) / E(number read), for a reader who reads on with chance .8 up to four."""
    class_g, utility_g = [0, 1, 1, 2], np.array([2.0, 5, 7, 3])
    generator = np.random.default_rng(0)
    read = np.minimum(generator.geometric(0.2, size=200_000), 4)
    seen = np.cumsum([2.0, 5, 0, 3])[read - 1]
    expected = seen.mean() / read.mean()
    assert noveltybench.utility_k(class_g, utility_g, 4) == pytest.approx(expected, abs=0.02)


def test_both_with_the_name_of_the_rule():
    texts = ["a cat", "A cat!", "a dog ran off", "a cat"]
    got = noveltybench.novelty("p", texts, [1, 1, 0.5, 1], equivalence.by_rouge(), patience=0.5)
    assert got[:3] == ("ROUGE-1 > 0.458", 4, 2) and got.utility == pytest.approx((1 + 0.25 * 0.5) * 8 / 15)
    first = noveltybench.novelty("p", texts, [1, 1, 0.5, 1], equivalence.exact(), k=2, patience=1)
    assert first == ("exact", 2, 2, 1.0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="k=3 of 2 completions"):
        noveltybench.distinct_k([0, 1], 3)
    with pytest.raises(ValueError, match="k=0"):
        noveltybench.utility_k([0], [1], 0)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 1 completions"):
        noveltybench.utility_k([0], [1, 2], 1)
    with pytest.raises(ValueError, match=r"patience=1\.5"):
        noveltybench.utility_k([0], [1], 1, patience=1.5)
