"""Qwen2.5's tokenizer from its published token ranks: the real vocabulary, for tests that need it."""

import base64
import binascii
import os
from pathlib import Path

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from mara_jax.hf.tokenizer import _CHATML, END_TEXT, IM_END, IM_START, _added, _bpe, _fast, _qwen_pieces, _read_text

# Qwen2.5's ids follow the 151,643 ranks in this order. Only the control tokens count as special; the tool and
# fill-in-the-middle marks are kept when special tokens are dropped from decoded text.
CONTROL = (
    END_TEXT, IM_START, IM_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
MARKS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
RANKS = 151_643

SYSTEM = (
    "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "  # one expression over two lines
    "You are a helpful assistant.<|im_end|>\n' }}"
)


def load(tiktoken_path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Builds Qwen2.5's tokenizer from the rank file that `dashscope` ships as resources/qwen.tiktoken.

    The ids are Qwen2.5's: 0 to 151,642 from the ranks, then its special tokens to 151,664. The model's
    embedding has 151,936 rows; the rest is padding that no text reaches.

    Args:
      tiktoken_path: lines of `base64(token) rank`, with all 151,643 ranks.

    Returns:
      The tokenizer; eos <|im_end|>, pad <|endoftext|>, chat template with Qwen's default system message.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a malformed line, or another number of ranks.
    """
    path = Path(tiktoken_path)
    ranks = _read_ranks(path)
    if len(ranks) != RANKS or set(ranks.values()) != set(range(RANKS)):
        raise ValueError(f"{path} has {len(ranks)} ranks; Qwen has {RANKS}, numbered from 0 without gaps")
    letters = _byte_letters()
    vocab = {_spell(token, letters): rank for token, rank in ranks.items()}
    merges = [
        tuple(_spell(part, letters) for part in _merge_pair(token, rank, ranks))
        for token, rank in ranks.items()
        if len(token) > 1
    ]
    vocab |= {token: RANKS + i for i, token in enumerate(CONTROL + MARKS)}
    tokenizer = _bpe(vocab, merges, normalizers.NFC, _qwen_pieces, path)
    tokenizer.add_special_tokens([_added(token, True) for token in CONTROL])
    tokenizer.add_tokens([_added(token, False) for token in MARKS])
    return _fast(
        tokenizer,
        _CHATML.replace("SYSTEM", SYSTEM),
        eos_token=IM_END,
        pad_token=END_TEXT,
    )


def _merge_pair(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes `token`: what is left when its bytes are merged by all lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= rank:
            raise ValueError(f"the token of rank {rank} is no merge of two tokens of lower rank; the file is damaged")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: expected 'base64 rank', found {line[:60]!r}") from None
    return ranks


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256)]


def _spell(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)
