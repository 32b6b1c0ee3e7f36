"""The molecules of each update: every one once an epoch, the same whenever asked, none lost, no padding in matmuls."""

import collections
import dataclasses

import numpy as np
import pytest

from mara_jax.prior.batches import TrainingSet
from mara_jax.prior.settings import Settings
from mara_jax.tasks.chemistry import molecules

SMILES = ["C" * n + "O" for n in range(1, 12)] + ["c1ccc(Br)cc1", "CC(=O)NCc1ccccc1"]
SETTINGS = Settings(batch=4, held_out=2, seed=3)


@pytest.fixture(scope="module")
def data():
    return TrainingSet(SMILES, SETTINGS)


def texts_of(data, batch):
    """The SMILES of a batch, by the tokenizer; rows that are left out are empty."""
    rows = [ids[:length].tolist() for ids, length in zip(batch.tokens[0], batch.lengths[0], strict=True)]
    assert all(row[-1] == data.tokenizer.eos_token_id for row in rows if row)
    return [data.tokenizer.decode(row[:-1]) for row in rows]


def test_every_molecule_is_read_once_before_any_is_read_again(data):
    assert len(data.train) == 11 and sorted(data.train + data.held_out) == sorted(SMILES)
    places = [place for step in range(22) for place in data.places(step)]  # eight epochs, not in step with batches
    for epoch in range(8):
        assert sorted(places[11 * epoch : 11 * (epoch + 1)]) == list(range(11))
    assert places[:11] != places[11:22]


def test_a_batch_is_a_function_of_seed_and_step(data):
    other = TrainingSet(SMILES, SETTINGS)
    later = other.batch(9)  # without those before
    for step in range(9):
        data.batch(step)
    for one, two in zip((*data.batch(9)[:2], *data.batch(9).packing), (*later[:2], *later.packing), strict=True):
        np.testing.assert_array_equal(one, two)
    reseeded = TrainingSet(SMILES, dataclasses.replace(SETTINGS, seed=4))
    assert reseeded.places(0) != data.places(0) or reseeded.train != data.train


def test_rows_are_the_molecules_with_eos(data):
    for step in range(3):
        assert texts_of(data, data.batch(step)) == [data.train[at] for at in data.places(step)]


def test_packing_holds_each_token_that_predicts_another_once(data):
    batch = data.batch(0)
    slots = batch.packing.place_cn[0]
    assert (slots >= 0).sum() == (batch.lengths - 1).sum() and batch.packing.place_cn.shape == (1, data.slots)
    place = slots[slots >= 0]
    row, time = place // (data.width - 1), place % (data.width - 1)
    assert (time < batch.lengths[0][row] - 1).all() and len({*place.tolist()}) == len(place)


def test_what_no_longer_fits_is_left_out_and_nothing_else(data):
    data = TrainingSet(SMILES, SETTINGS)
    data.slots = 10
    batch = data.of_smiles(["CCCCO", "CCCCCCO", "CCCCO", "CO"])
    assert texts_of(data, batch) == ["CCCCO", "", "CCCCO", ""] and (batch.packing.place_cn >= 0).sum() == 10
    assert texts_of(data, data.of_smiles(["CO"])) == ["CO", "", "", ""]


def test_hardly_a_slot_is_empty():
    generator = np.random.default_rng(0)
    smiles = ["C" * n for n in generator.integers(30, 41, 2000)]
    data = TrainingSet(smiles, Settings(batch=256, held_out=0))
    filled = [(data.batch(step).packing.place_cn >= 0).mean() for step in range(20)]
    assert min(filled) > 0.95 and all((data.batch(step).lengths > 0).all() for step in range(20))


def test_a_molecule_that_the_file_holds_twice_is_not_trained_on_where_it_is_held_out():
    data = TrainingSet(SMILES * 2, SETTINGS)
    assert len(data.held_out) == 2 and not {*data.train} & {*data.held_out}
    assert sorted(data.train) == sorted(text for text in SMILES * 2 if text not in data.held_out)
    with pytest.raises(ValueError, match="of 4 molecules 4 have at most longest=100 tokens"):
        TrainingSet(["CO"] * 4, SETTINGS)


def test_held_out_molecules_are_in_no_batch(data):
    held_out = [text for batch in data.held_out_batches() for text in texts_of(data, batch) if text]
    assert sorted(held_out) == sorted(data.held_out) and len(held_out) == 2
    trained = {text for step in range(6) for text in texts_of(data, data.batch(step))}
    assert trained == {*data.train} and not trained & {*held_out}


def test_molecules_that_are_too_long_are_left_out_and_counted():
    data = TrainingSet(SMILES, dataclasses.replace(SETTINGS, longest=6))
    assert sorted(data.train + data.held_out) == sorted("C" * n + "O" for n in range(1, 6)) and data.too_long == 8
    assert data.width == 7
    with pytest.raises(ValueError, match="of 13 molecules 1 have at most longest=2 tokens, and held_out=2 leaves"):
        TrainingSet(SMILES, dataclasses.replace(SETTINGS, longest=2))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_randomised_smiles_are_other_texts_of_the_same_molecules(share):
    settings = dataclasses.replace(SETTINGS, randomised=share)
    data, again = TrainingSet(SMILES, settings), TrainingSet(SMILES, settings)
    changed = collections.Counter()
    for step in range(12):
        written, original = texts_of(data, data.batch(step)), [data.train[at] for at in data.places(step)]
        assert written == texts_of(again, again.batch(step))
        for text, smiles in zip(written, original, strict=True):
            assert molecules.canonical_of([text]) == molecules.canonical_of([smiles])
            changed[text != smiles] += 1
    assert changed[True] > 0 and (share == 1.0 or changed[False] > changed[True] * 0.5)
    first, second = (texts_of(data, data.batch(step)) for step in (0, 11))
    assert first != second
