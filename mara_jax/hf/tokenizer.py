"""Fast tokenizers from a directory, a GGUF file, or trained here, all without torch."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mara_jax.policies.encoding import encode_prompts, front_ids

if TYPE_CHECKING:  # transformers takes two seconds to import; only the functions that build one pay for it
    from transformers import PreTrainedTokenizerFast

__all__ = ["decode", "encode_prompts", "end_tokens", "from_directory", "from_gguf", "nano"]

END_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}SYSTEM{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits_then_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)])


def _qwen_pieces() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"), _byte_level(False)])


# Classes of transformers 4 that put BOS in front of texts by add_bos_token, whatever tokenizer.json says.
_HEED_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
# tokenizer.ggml.pre -> (normaliser, pre-tokeniser)
_PRE_TOKENIZERS = {
    "smollm": (None, _digits_then_words),
    "qwen2": (normalizers.NFC, _qwen_pieces),
    "gpt-2": (None, lambda: _byte_level(True)),
}


# Our name of a special token -> GGUF's.
_GGUF_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def from_directory(path: str | os.PathLike) -> "PreTrainedTokenizerFast":
    """Reads tokenizer.json and, beside it, tokenizer_config.json and chat_template.jinja.

    `AutoTokenizer` is avoided on purpose: for a model type it knows, it replaces the file's splitting rules
    by its own class's, and can add a token whose id lies past the embedding.

    Args:
      path: a directory in the layout of the model hub.

    Returns:
      The tokenizer, splitting text exactly as the file says.

    Raises:
      FileNotFoundError: no such directory.
      ValueError: no tokenizer.json in it, or a file that is not UTF-8, not JSON, or not a tokenizer.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory; give one that holds tokenizer.json")
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"{path} has no tokenizer.json; copy it from the model's repository, or write it with "
            "transformers' AutoTokenizer.save_pretrained"
        )
    _check_json(file)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path / name).is_file():
            _check_json(path / name)
    if (path / "chat_template.jinja").is_file():
        _read_text(path / "chat_template.jinja")
    try:
        tokenizer = fast_class().from_pretrained(str(path))
    except Exception as error:  # the Rust reader raises a bare Exception on any malformed file
        raise ValueError(f"{file} is not a tokenizer that can be read: {_one_line(error)}") from None
    settings = path / "tokenizer_config.json"
    _follow_bos_setting(tokenizer, json.loads(_read_text(settings)) if settings.is_file() else {})
    return tokenizer


def _follow_bos_setting(tokenizer: "PreTrainedTokenizerFast", settings: dict[str, Any]) -> None:
    """BOS as add_bos_token of tokenizer_config.json asks for it, where tokenizer.json says otherwise.

    True counts whatever the tokenizer's class, False in the classes that transformers 4 had heed it.
    """
    bos, wanted = tokenizer.bos_token, settings.get("add_bos_token")
    heeds = str(settings.get("tokenizer_class")).removesuffix("Fast") in _HEED_ADD_BOS
    if bos is None or wanted is None or (wanted is False and not heeds):
        return
    if bool(wanted) != (front_ids(tokenizer)[:1] == [tokenizer.bos_token_id]):
        tokenizer.backend_tokenizer.post_processor = _in_front(bos, tokenizer.bos_token_id) if wanted else _in_front()


def _in_front(*marks: Any) -> processors.TemplateProcessing:
    """A post-processor that puts a token, given as text and id, in front of a text, or none."""
    return processors.TemplateProcessing(
        single=f"{marks[0]} $A" if marks else "$A", special_tokens=[marks] if marks else []
    )


def from_gguf(path: str | os.PathLike, reader: Any = None) -> "PreTrainedTokenizerFast":
    """Builds a byte-level BPE tokenizer from the metadata of a GGUF file.

    Args:
      path: the .gguf file.
      reader: the file's `gguf.GGUFReader` where one is open already (opening takes seconds).

    Returns:
      The tokenizer with the file's special tokens, bos, eos, pad, and chat template.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a GGUF file, another kind of tokenizer, or an unknown way to split text.
    """
    path = Path(path)
    if reader is None:
        reader = _open_gguf(path)
    read = {name: item.contents() for name, item in reader.fields.items() if name.startswith("tokenizer.")}
    kind, pre = read.get("tokenizer.ggml.model"), read.get("tokenizer.ggml.pre")
    cure = "load the model's safetensors with its tokenizer.json instead"
    if kind != "gpt2":
        raise ValueError(f"{path} holds a tokenizer of kind {kind!r}; only 'gpt2' (byte-level BPE) is known: {cure}")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ValueError(f"{path} splits text by the rule {pre!r}; the known ones are {known}: {cure}")
    tokens, kinds, merges = _gguf_vocabulary(read, path)
    normalizer, pieces = _PRE_TOKENIZERS[pre]
    tokenizer = _bpe({token: i for i, token in enumerate(tokens)}, merges, normalizer, pieces, path)
    control, user_defined = 3, 4  # GGUF token types
    tokenizer.add_special_tokens([_added(t, True) for t, k in zip(tokens, kinds, strict=True) if k == control])
    tokenizer.add_tokens([_added(t, False) for t, k in zip(tokens, kinds, strict=True) if k == user_defined])
    special = {}
    for role, field in _GGUF_ROLES.items():
        token = read.get(f"tokenizer.ggml.{field}_token_id")
        if token is not None and not 0 <= token < len(tokens):
            raise ValueError(
                f"{path} has {field}_token_id={token}, but tokens 0 to {len(tokens) - 1}: download it again"
            )
        if token is not None:
            special[role] = tokens[token]
    if read.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = _in_front(bos, tokens.index(bos))
    return _fast(tokenizer, read.get("tokenizer.chat_template"), **special)


def _gguf_vocabulary(read: dict[str, Any], path: Path) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Tokens, their types and the merges of a GGUF file; ValueError where one is not there or they do not agree."""
    tokens, kinds, lines = (read.get(f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type", "merges"))
    merges = [tuple(line.split(" ")) for line in lines]
    odd = next((merge for merge in merges if len(merge) != 2), None)
    if not tokens or not merges or len(kinds) != len(tokens) or len(set(tokens)) != len(tokens) or odd:
        raise ValueError(
            f"{path} has a broken vocabulary ({len(tokens)} tokens, {len(set(tokens))} of them distinct, {len(kinds)} "
            f"types, {len(merges)} merges{f', the merge {odd}' if odd else ''}): download it again"
        )
    return tokens, kinds, merges


def nano(texts: Iterable[str], vocab_size: int = 512) -> "PreTrainedTokenizerFast":
    """Trains a small byte-level BPE tokenizer; every digit is a token of its own.

    Args:
      texts: what to train on; the result does not depend on their order.
      vocab_size: the most tokens it may have: 3 special ones, 256 bytes, and merges. Texts with few distinct
        words can end with fewer.

    Returns:
      The tokenizer; ids 0, 1, 2 are <|endoftext|> (pad), <|im_start|>, <|im_end|> (eos); its chat template
      has no system message.

    Raises:
      ValueError: vocab_size under 259.
    """
    if vocab_size < 259:
        raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and 3 special tokens need at least 259")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _digits_then_words()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_added(token, True) for token in (END_TEXT, IM_START, IM_END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer, _CHATML.replace("SYSTEM", ""), eos_token=IM_END, pad_token=END_TEXT)


def end_tokens(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """The ids that end a completion, sorted: <|im_end|> and <|endoftext|> where known, and the eos."""
    known = tokenizer.get_vocab()
    ids = {known[token] for token in (IM_END, END_TEXT) if token in known}
    if tokenizer.eos_token in known:
        ids.add(known[tokenizer.eos_token])
    return tuple(sorted(ids))


def decode(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """The text of token ids, special tokens and every space kept; ids without a token add nothing."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def fast_class() -> "type[PreTrainedTokenizerFast]":
    """transformers' class of tokenizers, imported when it is asked for."""
    # Without torch, transformers warns at import that it has no models; only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast


def _fast(tokenizer: Tokenizer, chat_template: str | None, **special: str) -> "PreTrainedTokenizerFast":
    fast = fast_class()(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = chat_template
    return fast


def _bpe(vocab: dict[str, int], merges: list, normalizer: Any, pieces: Any, path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # bare Exception from Rust, for example a merge whose result has no id
        raise ValueError(f"{path} has a broken vocabulary: {_one_line(error)}") from None
    if normalizer is not None:
        tokenizer.normalizer = normalizer()
    tokenizer.pre_tokenizer = pieces()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _open_gguf(path: Path) -> Any:
    import gguf

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a .gguf file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader indexes past the end of a short file and raises many types
        raise ValueError(f"{path} is not a GGUF file that can be read: {_one_line(error)}") from None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); fetch the file again") from None


def _check_json(path: Path) -> None:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {_one_line(error)}; fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; fetch the file again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
