"""Prompts in, completions out: transformers' own ids and texts, and arithmetic on strings, are the known answers."""

import numpy as np
import pytest
import small_tokenizers
from small_tokenizers import BOS, END, EOS, byte_level, pieces, word_parts

from mara_jax.policies import encoding

KINDS = {
    "bytes": byte_level,
    "pieces": pieces,
    "unigram": lambda *marks, **more: pieces(*marks, unigram=True, **more),
}
TURNS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("behind", ["", EOS])
def test_prompts_begin_with_bos_once_and_never_end_with_eos(kind, behind):
    """With whatever post-processor: the ids are transformers' own without the end token."""
    tokenizer, bare = kind(BOS, behind), kind()
    bos = tokenizer.bos_token_id
    texts = ["Two primes: ", "a", " é 日\n", "ab</s>", ""]
    rows = encoding.encode_prompts(tokenizer, texts, chat=False)
    for text, row in zip(texts, rows, strict=True):
        assert row == [bos, *bare.encode(text)]
        assert row + [tokenizer.eos_token_id] * bool(behind) == tokenizer(text).input_ids
    # A text that begins with it, as one that the caller has put in a template, gets no second one.
    assert encoding.encode_prompts(tokenizer, ["<s>ab"], chat=False) == [bare.encode("<s>ab")]
    assert encoding.encode_prompts(bare, ["ab"], chat=False) == [bare.encode("ab")]
    assert encoding.encode_prompts(kind("", EOS), ["ab"], chat=False) == [bare.encode("ab")]


def test_limits_that_a_tokenizer_carries_cut_no_prompt(capsys):
    """tokenizer.json may say how training texts were cut and padded, and model_max_length how long they may be."""
    tokenizer = byte_level(BOS, model_max_length=3)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    assert len(encoding.encode_prompts(tokenizer, ["xyzxyzxyz"], chat=False)[0]) == 10
    assert capsys.readouterr().err == ""


def test_a_chat_template_writes_the_only_bos(kind):
    """As apply_chat_template: what the template says, whatever the tokenizer puts around plain texts."""
    for template, count in ((TURNS, 0), ("{{ bos_token }}" + TURNS, 1)):
        tokenizer = kind(BOS, EOS, chat_template=template)
        (row,) = encoding.encode_prompts(tokenizer, ["ab"], chat=True)
        message = [{"role": "user", "content": "ab"}]
        assert row == tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        assert row.count(tokenizer.bos_token_id) == count and row[-1] != tokenizer.eos_token_id
        # The caller's own rendering is encoded alike.
        text = encoding.in_template(tokenizer, "ab")
        assert encoding.encode_prompts(tokenizer, [text], chat=False)[0][-len(row) :] == row
        assert encoding.encode_prompts(tokenizer, [text], chat=False)[0].count(tokenizer.bos_token_id) == 1


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_completions_continue_their_prompt_exactly(kind):
    """text(prompt) + text(completion) == text(prompt + completion), of random tokens behind encoded texts.

    But where a decoder itself changes the prompt: a newline that is a byte token, followed by bytes that are no
    character, becomes U+FFFD with them.
    """
    tokenizer, rng = kind(BOS), np.random.default_rng(0)
    size = len(tokenizer)
    prompts = encoding.encode_prompts(tokenizer, ["Two primes:", "ab ", "a\n", "", "?", "<s>", "x é"], chat=False)
    rows = [rng.integers(0, size, rng.integers(0, 12)).tolist() for _ in range(300)]
    changed = 0
    for i, (row, text) in enumerate(zip(rows, encoding.decode_completions(tokenizer, rows), strict=True)):
        prompt = prompts[i % len(prompts)]
        before, joined = whole(tokenizer, prompt), whole(tokenizer, prompt + row)
        if joined.startswith(before):
            assert before + text == joined, (prompt, row)
        else:
            assert before.endswith("\n") and text.startswith("�")
            changed += 1
    assert changed == 0 if tokenizer.convert_tokens_to_ids("<0x0A>") == tokenizer.unk_token_id else changed < 30


def test_spaces_characters_and_special_tokens_of_completions(kind):
    """Texts of demonstrations come back as they are, and stand behind a prompt as they are."""
    tokenizer = kind(BOS)
    for text in (" ab", "ab", "  a", "a .", " n't ,", "日é", "é", "x<end_of_turn>", "", "\n\na", "\n", " ", "answer"):
        ids = encoding.encode_completion(tokenizer, text)
        assert encoding.decode_completions(tokenizer, [ids]) == [text]
        for prompt in ("Two primes:", "ab", "a\n"):
            (row,) = encoding.encode_prompts(tokenizer, [prompt], chat=False)
            assert whole(tokenizer, row + ids) == whole(tokenizer, row) + text


def test_a_character_that_is_cut_off_becomes_the_replacement_character():
    """é is C3 A9; of 日, E6 97 A5, two bytes are no character either. The end of a completion is never an error."""
    tokenizer = byte_level()
    one = encoding.encode_completion(tokenizer, "x日")
    assert encoding.decode_completions(tokenizer, [one, one[:-1], one[:-2], one[:1]]) == ["x日", "x�", "x�", "x"]
    tokenizer = pieces()
    byte_ids: list = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "ü".encode()]
    assert encoding.decode_completions(tokenizer, [byte_ids, byte_ids[:1]]) == ["ü", "�"]


def test_parts_of_words_and_texts_that_a_tokenizer_changes():
    """A later part of a word goes on with the prompt's last word; where case is lost, the ids are the text's own."""
    tokenizer = word_parts()
    parts: list = [tokenizer.convert_tokens_to_ids(token) for token in ("##cd", "ab", "##a")]
    assert encoding.decode_completions(tokenizer, [parts]) == ["cd aba"]
    assert encoding.encode_completion(tokenizer, "AB") == tokenizer.encode("ab")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURNS, END),
        ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} </s>{% endfor %}", EOS),
        ("{% for m in messages %}{{ m['content'] }}\n<end_of_turn>\n</s>{% endfor %}<s>model", END),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}", None),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", None),
        ("{{ messages[0]['content'] }}", None),
        ("{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}{{ messages[0] }}", None),
        (None, None),
    ],
)
def test_the_token_that_closes_a_turn(kind, template, end):
    tokenizer = kind(chat_template=template)
    found = encoding.end_of_turn(tokenizer)
    assert found == (None if end is None else small_tokenizers.MARKS.index(end))


def test_rows_without_a_token():
    tokenizer = byte_level()
    size = len(tokenizer)
    assert encoding.ids_without_token(tokenizer, size) == ()
    assert encoding.ids_without_token(tokenizer, size + 3) == ((size, size + 3),)
    vocab = {"a": 1, "b": 2, "c": 5, "d": 8}
    holes = type("Tokenizer", (), {"get_vocab": lambda self: vocab})()
    assert encoding.ids_without_token(holes, 10) == ((0, 1), (3, 5), (6, 8), (9, 10))


def test_chat_messages_a_system_prompt_and_variables_of_the_template():
    """As apply_chat_template of the same messages and variables."""
    template = "{% if thinking is defined %}{{ '<' ~ thinking ~ '>' }}{% endif %}" + TURNS
    tokenizer = byte_level(chat_template=template)
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}

    def rendered(messages, **options):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]

    encode = encoding.encode_prompts
    assert encode(tokenizer, [[system, user], "ab"], True) == [rendered([system, user]), rendered([user])]
    assert encode(tokenizer, ["ab"], True, "Be brief.") == [rendered([system, user])]
    assert encode(tokenizer, [[system, user]], True, "Be long.") == [rendered([system, user])]  # it has its own
    assert encode(tokenizer, ["ab"], True, options={"thinking": 7}) == [rendered([user], thinking=7)]
    with pytest.raises(ValueError, match=r"is made of chat messages: set --config.policy.chat=True"):
        encode(tokenizer, [[user]], False)
