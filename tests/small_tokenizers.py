"""Tokenizers of a few hundred tokens, of the kinds that models come with, made without any file."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, END = "<s>", "</s>", "<end_of_turn>"
MARKS = ("<unk>", BOS, EOS, END)


def fast(tokenizer: Tokenizer, **more) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=BOS, eos_token=EOS, **more)


def around(before: str, behind: str) -> processors.TemplateProcessing:
    """What puts tokens in front of every text and behind it."""
    marks = [(mark, MARKS.index(mark)) for mark in (before, behind) if mark]
    return processors.TemplateProcessing(single=f"{before} $A {behind}".strip(), special_tokens=marks)


def byte_level(before: str = "", behind: str = "", **more) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have: each byte a token, and a few pairs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {mark: i for i, mark in enumerate([*MARKS, *letters])}
    merges = [("Ġ", "a"), ("a", "b"), ("Ġ", "Ġ"), ("Ã", "©"), ("Ċ", "Ċ")]
    vocab |= {one + other: len(vocab) + i for i, (one, other) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast(_finished(tokenizer, decoders.ByteLevel(), before, behind), **more)


def pieces(before: str = "", behind: str = "", unigram: bool = False, **more) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have: words begin with ▁, and so does every text; rare characters fall to bytes."""
    words = ["▁", "▁a", "▁ab", *"abcdefghijklmnopqrstuvwxyz.:,!?0123456789", "▁answer", "é", "日"]
    every = [*MARKS, *(f"<0x{i:02X}>" for i in range(256)), *words]
    if unigram:
        model = models.Unigram([(piece, -float(len(words) - i)) for i, piece in enumerate(every)], 0, True)
    else:
        merges = [("▁", "a"), ("▁a", "b")]
        vocab = {piece: i for i, piece in enumerate(every)}
        model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    if unigram:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(" ", 1, 0)
        decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return fast(_finished(tokenizer, decoder, before, behind), **more)


def word_parts() -> PreTrainedTokenizerFast:
    """As BERT has: a word's later parts begin with ##; capital letters are lost."""
    words = [*MARKS, *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh"), "ab", "##cd"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return fast(_finished(tokenizer, decoders.WordPiece(cleanup=False), "", ""))


def _finished(tokenizer: Tokenizer, decoder, before: str, behind: str) -> Tokenizer:
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    if before or behind:
        tokenizer.post_processor = around(before, behind)
    return tokenizer
