"""The tokenizer of SMILES: the field's tokens and back, saved with a model, read by transformers."""

import pytest

from mara_jax.hf import smiles_tokenizer
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import encoding
from mara_jax.tasks.chemistry.smiles import tokens

SMILES = """CC(Cl)Br c1cc[nH]c1 C[C@@H](N)C(=O)O C[C@H](O)F C/C=C\\C C%12CCCCC%12 [13CH4] [O-][N+](=O)c1ccccc1 CC#N
    c1ccc2c(c1)oc1ccccc12 FC(F)(F)S(=O)(=O)N [se]1cccc1 [Na+].[Cl-] CC~C C$C C:C IPB OBO [2H]C
    Cc1ncsc1-c1ccco1""".split()


@pytest.fixture(scope="module")
def tokenizer():
    return smiles_tokenizer.of_tokens(token for smiles in SMILES for token in tokens(smiles))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    from mara_jax.hf import export_files

    folder = tmp_path_factory.mktemp("tokenizer")
    export_files.write_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.parametrize("smiles", SMILES)
def test_round_trip_in_the_field_s_tokens(tokenizer, smiles):
    ids = tokenizer.encode(smiles)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *tokens(smiles)]
    assert encoding.decode_completions(tokenizer, [ids[1:]]) == [smiles]
    assert encoding.encode_completion(tokenizer, smiles) == ids[1:]


def test_a_prompt_without_text_is_bos(tokenizer):
    assert encoding.encode_prompts(tokenizer, ["", "CC"], chat=False)[0] == [tokenizer.bos_token_id] == [1]
    assert tokenizers.end_tokens(tokenizer) == (tokenizer.eos_token_id,) == (2,)


def test_ids_do_not_depend_on_the_order_of_tokens(tokenizer):
    texts = [token for smiles in reversed(SMILES) for token in tokens(smiles)]
    assert smiles_tokenizer.of_tokens(texts).get_vocab() == tokenizer.get_vocab()


def test_what_has_no_id_is_unknown(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("C[Zn]C")) == ["<bos>", "C", "<unk>", "C"]


def test_saved_and_read_by_us_and_by_transformers(tokenizer, saved):
    from transformers import AutoTokenizer

    for read in (tokenizers.from_directory(saved), AutoTokenizer.from_pretrained(saved)):
        for smiles in SMILES:
            assert read(smiles).input_ids == tokenizer(smiles).input_ids
            assert read.decode(read(smiles).input_ids[1:]) == smiles
        assert (read.bos_token, read.eos_token, read.pad_token, read.unk_token) == ("<bos>", "<eos>", "<pad>", "<unk>")
