"""What ends a completion: the base weights' end token, and with a chat template the token that closes a turn."""

import dataclasses

from small_tokenizers import END, MARKS, byte_level
from tiny_policy import tiny

from mara_jax.policies import encoding
from mara_jax.train import prompts, warmup

TURNS = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + 'CLOSE\n' }}{% endfor %}"
EOS_ID, END_ID = MARKS.index("</s>"), MARKS.index(END)


def policy_with(eos: tuple[int, ...], template: str | None):
    policy, _ = tiny(vocab=300)
    return dataclasses.replace(policy, eos_ids=eos, tokenizer=byte_level(chat_template=template))


def test_the_end_of_a_turn_ends_completions_of_chats_alone():
    policy = policy_with((EOS_ID,), TURNS.replace("CLOSE", END))
    assert prompts.ended_by_turns(policy, True).eos_ids == (EOS_ID, END_ID)
    assert prompts.ended_by_turns(policy, False).eos_ids == (EOS_ID,)
    assert prompts.endings(prompts.ended_by_turns(policy, True), True) == "completions end at </s>, <end_of_turn>"
    assert prompts.endings(policy, False) == "completions end at </s>"
    # Base weights that name no end token have that of the turn.
    assert prompts.ended_by_turns(dataclasses.replace(policy, eos_ids=()), True).eos_ids == (END_ID,)


def test_demonstrations_are_closed_as_turns_are():
    tokenizer = byte_level(chat_template=TURNS.replace("CLOSE", END))
    assert encoding.closing_id(tokenizer, True) == END_ID and encoding.closing_id(tokenizer, False) == EOS_ID
    policy = policy_with((EOS_ID,), None)
    ab = policy.tokenizer.encode("ab")
    _, _, tokens, lengths = warmup.demonstration_batch(policy, [([1], "ab")], 6, END_ID)
    assert tokens[0, 0, : lengths[0, 0]].tolist() == [*ab, END_ID]


def test_where_nothing_ends_a_completion_one_line_says_so():
    for template, chat, words in (
        (None, False, "names no end token; set"),
        (TURNS.replace("CLOSE", "<|im_end|>"), True, "closes a turn with no special token"),
    ):
        line = prompts.endings(prompts.ended_by_turns(policy_with((), template), chat), chat)
        assert line.startswith("WARNING: nothing will end a completion") and words in line and "\n" not in line
    line = prompts.endings(policy_with((EOS_ID,), TURNS.replace("CLOSE", "")), True)
    assert line.startswith("WARNING: completions end at </s> alone: the chat template closes a turn with no special")
