"""The molecules of each update, as a function of (seed, step), packed so that padding costs no matmul."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.hf import smiles_tokenizer
from mara_jax.policies.packing import Packing, pack_lengths
from mara_jax.prior.settings import Settings
from mara_jax.tasks.chemistry import molecules
from mara_jax.tasks.chemistry.smiles import tokens

_MEASURED = 2000  # molecules whose randomised SMILES tell how long those are
_MULTIPLE = 64  # of the slots of a batch
# Keys of numpy's counter-based generators: [seed, stream, ...].
_ORDER, _HELD_OUT, _RANDOMISED, _MEASURE = range(4)


class Batch(NamedTuple):
    """Molecules of an update, right-padded: tokens [1, b, t] (EOS included, BOS not), lengths [1, b], their packing."""

    tokens: np.ndarray
    lengths: np.ndarray
    packing: Packing


class TrainingSet:
    """SMILES, some of them held out, and the batches made of the others.

    Attributes:
      train, held_out: SMILES; tokenizer: has an id for each of their tokens; too_long: how many were left out.
      width: tokens of a padded row; slots: of a packed batch; both are the same at all steps, so that one program is
        compiled.
    """

    def __init__(self, smiles: Sequence[str], settings: Settings) -> None:
        """Raises ValueError where no molecule is left to train on."""
        counted, lengths, known = [], [], set()
        for text in smiles:
            parts = tokens(text)
            if len(parts) <= settings.longest:
                counted.append(text)
                lengths.append(len(parts))
                known.update(parts)
        self.settings, self.too_long = settings, len(smiles) - len(counted)
        order = _generator(settings.seed, _HELD_OUT).permutation(len(counted))
        self.held_out = [counted[at] for at in sorted(order[: settings.held_out].tolist())]
        # A file may hold a molecule twice: what is held out is nowhere trained on.
        held_out = set(self.held_out)
        trained = [at for at, text in enumerate(counted) if text not in held_out]
        self.train = [counted[at] for at in trained]
        if not trained:
            raise ValueError(
                f"of {len(smiles)} molecules {len(counted)} have at most longest={settings.longest} tokens, and "
                f"held_out={settings.held_out} leaves none for training: lower that, raise longest, or add molecules"
            )
        self.width = settings.longest + 1 if settings.randomised else max(lengths) + 1
        lengths = [lengths[at] for at in trained]
        if settings.randomised:
            sample = _generator(settings.seed, _MEASURE).choice(len(self.train), _MEASURED).tolist()
            written = [tokens(text) for text in molecules.randomised([self.train[at] for at in sample], sample)]
            lengths += [len(parts) for parts in written]
            known.update(part for parts in written for part in parts)
        self.tokenizer = smiles_tokenizer.of_tokens(known)
        self._ids = self.tokenizer.get_vocab()
        self.slots = _slots(np.array(lengths), settings.batch, self.width)
        self._permutation = functools.lru_cache(maxsize=2)(self._permutation_of)

    def batch(self, step: int) -> Batch:
        """The batch of an update, counted from 0."""
        settings = self.settings
        texts = [self.train[at] for at in self.places(step)]
        if settings.randomised:
            generator = _generator(settings.seed, _RANDOMISED, step)
            chosen = generator.random(len(texts)) < settings.randomised
            seeds = generator.integers(0, 2**31 - 1, len(texts))  # one a position, whether it is used or not
            others = iter(molecules.randomised([texts[at] for at in np.flatnonzero(chosen)], seeds[chosen].tolist()))
            texts = [next(others) if random else text for text, random in zip(texts, chosen, strict=True)]
        return self.of_smiles(texts)

    def places(self, step: int) -> list[int]:
        """Which molecules of `train` an update reads: each once before any is read again."""
        count, size = len(self.train), self.settings.batch
        at = range(step * size, (step + 1) * size)
        return [int(self._permutation(place // count)[place % count]) for place in at]

    def _permutation_of(self, epoch: int) -> np.ndarray:
        return _generator(self.settings.seed, _ORDER, epoch).permutation(len(self.train)).astype(np.int32)

    def of_smiles(self, texts: Sequence[str]) -> Batch:
        """A batch of these SMILES, at most as many as settings.batch.

        Those that no longer fit the slots, and randomised SMILES that are longer than the width or have a token that no
        other had, are left out: their rows are empty.
        """
        b, eos, room = self.settings.batch, self._ids[smiles_tokenizer.EOS], self.slots
        tokens_bt = np.full((b, self.width), self._ids[smiles_tokenizer.PAD], np.int32)
        lengths_b = np.zeros(b, np.int32)
        for row, text in enumerate(texts):
            ids = [self._ids.get(token, -1) for token in tokens(text)]
            if len(ids) > room or len(ids) >= self.width or -1 in ids:
                continue
            room -= len(ids)
            tokens_bt[row, : len(ids) + 1] = [*ids, eos]
            lengths_b[row] = len(ids) + 1
        # What is packed are the tokens that predict another: all but the last of a row. BOS is the shared prompt.
        packing = pack_lengths(np.maximum(lengths_b - 1, 0), self.width - 1, slots=self.slots)
        return Batch(tokens_bt[None], lengths_b[None], packing)

    def held_out_batches(self) -> list[Batch]:
        """The molecules that are held out, in batches."""
        size = self.settings.batch
        return [self.of_smiles(self.held_out[at : at + size]) for at in range(0, len(self.held_out), size)]


def _slots(lengths: np.ndarray, batch: int, width: int) -> int:
    """Slots that hold a batch but once in some ten thousand: four standard deviations above the mean."""
    most = float(lengths.mean()) * batch + 4 * float(lengths.std()) * math.sqrt(batch)
    return min(-(-math.ceil(most) // _MULTIPLE) * _MULTIPLE, batch * (width - 1))


def _generator(*key: Any) -> np.random.Generator:
    return np.random.default_rng(key)
