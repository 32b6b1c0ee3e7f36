"""Text to tokens and back: the one way in which prompts are encoded and completions decoded, whoever asks.

The tokenizers are those of transformers, made in `hf.tokenizer`; nothing here reads a file.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

# Today, in every chat template: the date that Llama 3.1's prints where it has no clock.
_DATE = datetime.datetime(2024, 7, 26)
# Ordinary text that precedes whatever a tokenizer treats differently at the beginning of a text.
_BEFORE = ("", "\n", ":", "a", "a\n", ".")
_ANSWER = "an answer"


Prompt = str | Sequence[Mapping[str, str]]  # a text, or chat messages


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], chat: bool, system: str = "", options: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Turns prompts into token ids, up to where the model's own text starts.

    Args:
      tokenizer: a fast tokenizer of transformers.
      prompts: p texts or lists of chat messages.
      chat: wrap each as the user's message of the chat template, or put its messages there, and open the assistant's
        turn, as the tokenizer's `apply_chat_template` does; else the text as it is, behind what the tokenizer puts in
        front of every text (BOS), once, also where the text begins with it already. What it puts behind a text (EOS) is
        left out.
      system: with chat, a system message in front of prompts that have none; "" for none.
      options: with chat, variables of the template, as enable_thinking of Qwen3's.

    Returns:
      p lists of ids.

    Raises:
      ValueError: chat without a chat template or with one that cannot be run, chat messages without chat, or a prompt
        with no tokens.
    """
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: set --config.policy.chat=False, or give it a chat_template.jinja"
        )
    front = [] if chat else front_ids(tokenizer)  # a chat template writes its own
    rows = []
    for prompt in prompts:
        text = in_template(tokenizer, prompt, system, options or {}) if chat else _bare(prompt)
        row = _plain(tokenizer, text)
        row = row if row[: len(front)] == front else front + row
        if not row:
            raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one")
        rows.append(row)
    return rows


def _bare(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt {prompt!r:.80} is made of chat messages: set --config.policy.chat=True")
    return prompt


def encode_answered(tokenizer: Any, prompts: Sequence[Prompt], completions: Sequence[str], pad_id: int | None) -> list:
    """Token ids of whole conversations, as a reward model reads them.

    Args:
      tokenizer: the reward model's own; prompts, completions: n of each; pad_id: pad_token_id of its config.json, or
        None. transformers scores the last token that is no padding: so what ends with that id, as a closing end token
        may, is cut.

    Returns:
      n lists of ids: the prompt's messages and the completion as the assistant's in the chat template, with its end of
      turn; without a template the texts as they follow each other, and the tokenizer's end token.

    Raises:
      ValueError: chat messages without a chat template, or a template that cannot be run.
    """
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise ValueError(
                    f"the prompt {prompt!r:.80} is made of chat messages, and the reward model's tokenizer has no chat "
                    "template: give it a chat_template.jinja, or write prompts as texts"
                )
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids = front_ids(tokenizer) + _plain(tokenizer, prompt + completion) + end
        else:
            messages = [*_messages(prompt), {"role": "assistant", "content": completion}]
            ids = _plain(tokenizer, _of_template(tokenizer, messages, False, prompt, {}))
        while len(ids) > 1 and ids[-1] == pad_id:
            ids.pop()
        rows.append(ids)
    return rows


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that follows a prompt: decoded behind it, they are this text again.

    A tokenizer may treat the beginning of a text as the beginning of a word, and give it a space that a text in the
    middle of another does not have. It is then encoded behind other text, whose ids are cut off.
    """
    for before in _BEFORE:
        head, ids = _plain(tokenizer, before) if before else [], _plain(tokenizer, before + text)
        if ids[: len(head)] == head and decode_completions(tokenizer, [ids[len(head) :]]) == [text]:
            return ids[len(head) :]
    return _plain(tokenizer, text)  # it changes the text itself (to lower case, say)


def decode_completions(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of completions, as they continue a prompt: every space and special token is kept.

    Decoders may drop the space in front of a text's first word; here it is no text's first. Bytes that are no whole
    character become U+FFFD, and ids without a token nothing.
    """
    anchor = _plain(tokenizer, "a")
    start, *texts = tokenizer.batch_decode(
        [anchor, *(anchor + list(row) for row in rows)], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return [str(text).removeprefix(start) for text in texts]


def front_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text, most often BOS or nothing."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return encoded.input_ids[: [*encoded.special_tokens_mask, 0].index(0)]


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template closes the assistant's turn; None where there is none."""
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, answer, closing = _rendered(tokenizer, messages, add_generation_prompt=False).rpartition(_ANSWER)
    except Exception:  # a template is a program: one that knows no answers may fail in any way
        return None
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return next((token for token in _plain(tokenizer, closing) if token in special), None) if answer else None


def closing_id(tokenizer: Any, chat: bool) -> int | None:
    """The token that closes a completion: of the chat template's turn where there is one, else the tokenizer's eos."""
    turn = end_of_turn(tokenizer) if chat else None
    return tokenizer.eos_token_id if turn is None else turn


def ids_without_token(tokenizer: Any, vocab_size: int, eos_ids: Sequence[int] = ()) -> tuple[tuple[int, int], ...]:
    """The rows of an embedding that stand for no token, as ranges (first, last + 1): padding, and holes.

    Those that end a completion count, whether or not the tokenizer has them.
    """
    known = {*tokenizer.get_vocab().values(), *eos_ids, vocab_size}
    ranges, first = [], 0
    for token in sorted(known):
        ranges += [(first, token)] if first < token else []
        first = token + 1
    return tuple(ranges)


def in_template(tokenizer: Any, prompt: Prompt, system: str = "", options: Mapping[str, Any] | None = None) -> str:
    """A prompt in the chat template, with the assistant's turn opened; errors as of `encode_prompts`."""
    messages = _messages(prompt)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return _of_template(tokenizer, messages, True, prompt, options or {})


def _of_template(
    tokenizer: Any, messages: list[dict[str, str]], opened: bool, prompt: Prompt, options: Mapping[str, Any]
) -> str:
    """Messages in the chat template, the assistant's turn opened or not; errors name the prompt."""
    try:
        return _rendered(tokenizer, messages, add_generation_prompt=opened, **options)
    except Exception as error:  # a template is a program: running it can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the tokenizer's chat template fails on the prompt {prompt!r:.60} ({type(error).__name__}: {reason}): "
            "set --config.policy.chat=False, or mend its chat_template.jinja"
        ) from error


def _rendered(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool, **options: Any) -> str:
    template = _dated(tokenizer.get_chat_template())
    return str(
        tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    )


def _dated(template: str) -> str:
    """A chat template in which today is always _DATE: one that prints the date would make another prompt each day.

    transformers hands templates the clock as strftime_now(format), and takes no other function for it: so the template
    itself gets one. The newline after its end is dropped, as after every Jinja block.
    """
    if "strftime_now" not in template:
        return template
    letters = "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZf"
    fields = {f"%{flag}{letter}": _DATE.strftime(f"%{flag}{letter}") for flag in ("", "-") for letter in letters}
    percent = "\x00"  # stands for %% meanwhile
    pairs = [("%%", percent), *fields.items(), (percent, "%")]
    # One after the other: of filters behind filters Jinja takes a second to make a program.
    lines = "".join(f"{{% set format = format|replace({field!r}, {value!r}) %}}" for field, value in pairs)
    return f"{{% macro strftime_now(format) %}}{lines}{{{{ format }}}}{{% endmacro %}}\n{template}"


def _plain(tokenizer: Any, text: str) -> list[int]:
    # Not verbose: a text longer than the tokenizer's own limit would print a warning; the model's limit is checked.
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
