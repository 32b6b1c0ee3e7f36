"""The generate command: completions of prompts, grouped by answer and counted."""

import dataclasses
import json
import sys
from typing import Any

from absl import flags
from rich.console import Console

from mara_jax import cli
from mara_jax.cli import Flag

CHAT = ("auto", "yes", "no")
COMMAND = cli.Command(
    name="generate",
    purpose="""Draws completions of one prompt, or of each prompt of a file, and prints how often each answer was given
    and how likely the policy is to give it. An answer is the completion's text, or what --answer says of it.""",
    examples=(
        'python -m mara_jax.generate --weights=smollm2-135m-instruct --prompt="Hi."',
        "python -m mara_jax.generate --weights=runs/own/model --prompts=own.jsonl",
    ),
    flags=(
        Flag(
            "weights",
            "DIR_OR_NAME",
            "directory of a model, an adapter or a run, WORKDIR/checkpoints/STEP, .gguf file, hub id, embedded name",
        ),
        Flag("prompt", "TEXT", "one prompt"),
        Flag("prompts", "FILE", "a file of prompts: .jsonl, .csv, .parquet, or a saved dataset's directory"),
        Flag("samples", "N", "completions of each prompt", 16, int, least=1, most=65536),
        Flag("max_new_tokens", "N", "length limit of a completion, in tokens", 64, int, least=1, most=1 << 20),
        Flag("temperature", "T", "divides the logits; 0 takes the likeliest token", 1.0, float, least=0, most=1e6),
        Flag("top_p", "P", "draws from the likeliest tokens that hold this share", 1.0, float, least=1e-9, most=1),
        Flag("chat", "", "whether prompts stand in the chat template; auto: where there is one", "auto", choices=CHAT),
        Flag("answer", "FILE.py:FUNCTION", "which answer a completion gives: function(prompt, completion, **columns)"),
        Flag("seed", "N", "of the random draws", 0, int, least=0, most=(1 << 31) - 1),
        Flag("json", "", "print one JSON object for each prompt", False, bool),
    ),
    required=("weights",),
)
AT_ONCE = 256  # completions that are decoded together


def main(argv: list[str]) -> int:
    """Prints; returns the exit status."""
    return cli.run(COMMAND, generate, argv)


def generate(argv: list[str]) -> int:
    """Prints completions of the prompts that the command line names.

    Raises:
      ValueError, OSError: one line.
    """
    values = parse(argv)
    from mara_jax.generate import drawing
    from mara_jax.train import sampled

    rows = _rows(values)
    console = Console(soft_wrap=True, highlight=False)
    settings = {"temperature": values.temperature, "top_p": values.top_p}
    with drawing.answer_function(values.answer, rows) as answer:
        policy = sampled.load(values.weights, values.chat)
        if policy.warning():
            print(policy.warning(), file=sys.stderr)
        for number, row in enumerate(rows):  # before any is sampled, so that one that is too long costs nothing
            try:
                policy.encode([row["prompt"]], values.max_new_tokens)
            except ValueError as error:
                raise ValueError(f"{rows.where(number)}: {error}" if values.prompts else str(error)) from None
        for number, row in enumerate(rows):
            sizes = drawing.Sizes(number, values.samples, values.max_new_tokens, AT_ONCE, values.seed)
            samples = drawing.draw(policy, row["prompt"], sizes, settings)
            samples = drawing.answered(samples, row, answer)
            if values.json:
                print(json.dumps(_as_json(row, samples), ensure_ascii=False, allow_nan=False))
            else:
                console.print(drawing.table(row["prompt"], samples))
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: an unknown flag, a wrong value, or not exactly one of --prompt and --prompts.
    """
    values = cli.parse(COMMAND, argv)
    if (values.prompt is None) == (values.prompts is None):
        raise ValueError(f"give one of --prompt and --prompts, as in {COMMAND.examples[0]}")
    return values


def _rows(values: flags.FlagValues) -> Any:
    from mara_jax.tasks import prompt_file

    if values.prompts is not None:
        return prompt_file.read(values.prompts)
    if values.prompt and not values.prompt.strip():  # behind BOS the empty text is a prompt
        raise ValueError("--prompt is empty: write a text")
    return [{"prompt": values.prompt}]


def _as_json(row: Any, samples: list[Any]) -> dict[str, Any]:
    from mara_jax.generate import drawing

    return {
        "prompt": row["prompt"],
        "answers": [dataclasses.asdict(one) for one in drawing.counted(samples)],
        "samples": [dataclasses.asdict(one) for one in samples],
    }
