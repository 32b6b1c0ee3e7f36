"""A random chemical language model of six tokens, many of whose completions are molecules."""

import pathlib

import jax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mara_jax import hf
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy

END = "<s>"  # in front of a text, and what ends a completion
ATOMS = ("C", "N", "O", "=", "F")


def smiles_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each atom and the double bond."""
    vocabulary = {token: number for number, token in enumerate((END, *ATOMS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="C"))  # what it does not know is not written back
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    names = {"pad_token": END, "bos_token": END, "eos_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def random_policy() -> tuple[Policy, dict]:
    """A random policy over these tokens, each about equally likely everywhere, and its parameters."""
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16, "tie_embeddings": False, "max_positions": 32}
    arch = transformer.Architecture("qwen2", 1 + len(ATOMS), 16, 1, **shape)
    policy = Policy(arch, smiles_tokenizer(), (0,), 0, {}, "random")
    return policy, transformer.init(arch, jax.random.key(0))


def random_prior(out: pathlib.Path) -> pathlib.Path:
    """A directory that holds it."""
    return hf.export(*random_policy(), out)
