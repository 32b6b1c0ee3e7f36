"""The tokenizer of a chemical language model: one token for each token of a SMILES, saved with the model."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mara_jax.hf.tokenizer import fast_class
from mara_jax.tasks.chemistry.smiles import TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def of_tokens(tokens: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer that splits SMILES by the expression of Schwaller et al. and puts BOS in front of them.

    A completion of the empty text is then a whole molecule. What has no id becomes <unk>.

    Args:
      tokens: those that get an id, in any order and as often as they come.

    Returns:
      The tokenizer; ids 0 to 3 are <pad>, <bos>, <eos> and <unk>, the others in the order of the alphabet.
    """
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *sorted({*tokens} - {*SPECIAL})))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces between tokens
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return fast_class()(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
    )
