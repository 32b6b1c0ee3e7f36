"""The evaluate command: one finished run in full, or several side by side."""

import pathlib
from typing import Any

from absl import flags
from rich.console import Console

from mara_jax import cli
from mara_jax.cli import Flag

CHAT = ("auto", "yes", "no")
RULES = ("exact", "rouge1", "embedding")  # as of `prompt_measures.likeness_of`
ACTIONS = ("show", "compare", "population", "run")
NEEDED = ("weights", "prompts", "out")  # of run, and one or both of reward and reward_model
COMMAND = cli.Command(
    name="evaluate",
    purpose="""show prints where the completions of each run end, beside its reference policy and its optimum, and
    draws its figure again; compare prints several runs side by side, with means over those that differ in their seed
    alone, or several evaluations that run has written, and says which of their differences exceed their intervals;
    population draws Figures 7 and 8 of a population into its workdir, and counts its members that end with one
    answer, or with equal ones. run measures weights on a file of prompts: reward, pass@k, majority@k, and how different
    answers and texts are, with intervals; it writes OUT/evaluation.json, and OUT/evaluation.html to read. Of several
    weights it compares them, and draws reward against diversity.""",
    examples=(
        "python -m mara_jax.evaluate show runs/nano",
        "python -m mara_jax.evaluate compare runs/nano runs/vanilla --markdown",
        "python -m mara_jax.evaluate compare runs/nano-test runs/own-test --out=runs/ab",
        "python -m mara_jax.evaluate population runs/population",
    ),
    flags=(
        Flag("markdown", "", "print the comparison as a markdown table", False, bool),
        Flag(
            "weights",
            "DIR_OR_NAME",
            "directory of a model, an adapter or a run, WORKDIR/checkpoints/STEP, .gguf file, hub id, "
            "embedded name; several, separated by commas",
        ),
        Flag("prompts", "FILE", "a file of prompts: .jsonl, .csv, .parquet, or a saved dataset's directory"),
        Flag("reward", "FILE.py:FUNCTION", "function(prompts, completions, **columns); several, separated by commas"),
        Flag("reward_model", "DIR", "a reward model, whose scores are added, or alone where there is no --reward"),
        Flag("answer", "FILE.py:FUNCTION", "a completion's answer: function(prompt, completion, **columns)"),
        Flag("threshold", "R", "a completion is good from this reward on", 0.8, float),
        Flag("failure", "", "where a function fails: stop, or take 0 as the reward", "stop", choices=("stop", "value")),
        Flag("samples", "N", "completions of each prompt", 16, int, least=1, most=65536),
        Flag("max_new_tokens", "N", "length limit of a completion, in tokens", 64, int, least=1, most=1 << 20),
        Flag("chat", "", "whether prompts stand in the chat template; auto: where there is one", "auto", choices=CHAT),
        Flag("seed", "N", "of the random draws", 0, int, least=0, most=(1 << 31) - 1),
        Flag(
            "equivalence",
            "RULE",
            "when two completions are the same, for novelty/distinct_k: but for white space, "
            "alike in words, or alike in meaning",
            "rouge1",
            choices=RULES,
        ),
        Flag(
            "similarity",
            "S",
            "they are above this ROUGE-1 (0: .458) or cosine of embeddings",
            0.0,
            float,
            least=0,
            most=1,
        ),
        Flag(
            "embedder",
            "DIR",
            "also measures distances of embeddings: a directory with model.onnx and "
            "tokenizer.json, or `installed`, all-MiniLM-L6-v2",
        ),
        Flag("out", "DIR", "where run writes, or the comparison of evaluations"),
    ),
    arguments="show|compare|population RUN ... | run",
)


def main(argv: list[str]) -> int:
    """Prints; returns the exit status."""
    return cli.run(COMMAND, evaluate, argv)


def evaluate(argv: list[str]) -> int:
    """Prints one run's final table and draws its figure again, prints a comparison of several, or measures weights.

    Raises:
      ValueError, OSError: one line.
    """
    values, action, workdirs = parse(argv)
    console = Console(soft_wrap=True, highlight=False)
    if action == "run":
        from mara_jax.evaluate import measuring

        given: dict[str, Any] = {name: values[name].value for name in measuring.Settings._fields}
        given |= {name: given[name] or "" for name in ("reward", "reward_model", "answer", "embedder")}
        settings = measuring.Settings(**given)
        measuring.run(settings, folder_of_evaluation(values.out), console)
        say_where(values.out, console)
        return 0
    from mara_jax.evaluate import comparison
    from mara_jax.train import summary

    if action == "compare":
        if any(map(is_evaluation, workdirs)):
            compare_evaluations(workdirs, values.out, values.markdown, console)
            return 0
        if values.out is not None:
            raise ValueError("--out is where the comparison of evaluations goes: leave it out for runs")
        compared = comparison.compare(workdirs)
        console.print(compared.markdown if values.markdown else compared.table)
        return 0
    for workdir in workdirs:
        if action == "population":
            show_population(pathlib.Path(workdir), console)
            continue
        console.print(summary.final_table(workdir))
        console.print(f"figure: {summary.final_figure(workdir)}")
        summary.show_evaluations(workdir, console)
        summary.show_modes(workdir, console)
    return 0


def is_evaluation(folder: str) -> bool:
    """Whether `evaluate run` has written this folder, and no run has."""
    path = pathlib.Path(folder)
    return (path / "evaluation.json").is_file() and not (path / "metrics.jsonl").is_file()


def compare_evaluations(folders: list[str], out: str | None, markdown: bool, console: Console) -> None:
    """Prints which differences of evaluations exceed their intervals, and writes a page of all where `out` says.

    Raises:
      ValueError, OSError: one line; runs among them, or evaluations of different prompts or settings.
    """
    from mara_jax.evaluate import measuring, models

    path = None if out is None else folder_of_evaluation(out)
    runs = [folder for folder in folders if (pathlib.Path(folder) / "metrics.jsonl").is_file()]
    if runs:
        raise ValueError(f"{runs[0]} is a run, others are evaluations: compare runs, or what evaluate run made of them")
    evaluated = models.read(folders)
    models.check_comparable(evaluated)
    measuring.show(evaluated, console, markdown)
    if path is not None:
        measuring.write(evaluated, path)
        say_where(str(path), console)


def folder_of_evaluation(out: str) -> pathlib.Path:
    """Where an evaluation is written.

    Raises:
      ValueError: it cannot be written, or is a run's, whose own evaluation.png has the same name.
    """
    folder = cli.writable_folder(out)
    if (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"--out={out} is a run's, whose figures would be replaced: choose another, as {out}/evaluation"
        )
    return folder


def say_where(out: str, console: Console) -> None:
    """Says which files were written."""
    console.print(f"written: {out}/evaluation.json, and to read: {out}/evaluation.html", markup=False)


def show_population(workdir: pathlib.Path, console: Console) -> None:
    """Draws figure7 and figure8 into a population's workdir, and prints how many members end how; errors as of
    `population_curves.read`."""
    from mara_jax.evaluate import population_curves, population_drawing
    from mara_jax.train import workdir as workdirs
    from mara_jax.train.tables import NumberTable

    members = population_curves.read(workdir)
    table = NumberTable.with_headers("members", "beta", "runs", "one answer", "equal answers", "mean bits", lines=True)
    table.caption = f"within {population_curves.MARGIN} bits of one answer, or of equal shares of all"
    for row in population_curves.counts(members):
        shown = (f"{row['beta']:g}", row["members"], row["one"], row["equal"], f"{row['bits']:.3f}")
        table.add_row(row["kind"], *map(str, shown))
    console.print(table)
    figures = (population_drawing.figure7, population_drawing.figure8)
    paths = [draw(workdir / f"{draw.__name__}.png", members) for draw in figures]
    workdirs.write_json(workdir / "figure7and8.json", population_curves.as_json(members))
    console.print(f"figures: {paths[0]}, {paths[1]}   numbers: {workdir / 'figure7and8.json'}", markup=False)


def parse(argv: list[str]) -> tuple[flags.FlagValues, str, list[str]]:
    """The flags of this command, what to do, and the workdirs of the runs.

    Raises:
      ValueError: an unknown flag or action, or no run.
    """
    values, arguments = cli.parse_with_arguments(COMMAND, argv)
    if not arguments or arguments[0] not in ACTIONS:
        raise ValueError(f"say what to do, {' or '.join(ACTIONS)}, as in {COMMAND.examples[0]}")
    if arguments[0] == "run":
        missing = [name for name in NEEDED if values[name].value is None]
        missing += ["reward"] if values.reward is None and values.reward_model is None else []
        if missing or arguments[1:]:
            what = f"--{missing[0]} is missing" if missing else f"unexpected argument {arguments[1]!r}"
            raise ValueError(
                f"{what}: evaluate run takes --weights, --prompts, --reward or --reward_model, --out, and maybe "
                "--answer"
            )
        return values, "run", []
    if not arguments[1:]:
        raise ValueError(f"name at least one workdir, as in {COMMAND.examples[0]}")
    return values, arguments[0], arguments[1:]
