"""NoveltyBench's prompts before and after training: SmolLM2 as it is, and trained without and with MARA.

  python benchmarks/noveltybench.py --prompts=curated.jsonl --folder=runs/novelty

`--prompts`: the 100 curated prompts of https://github.com/novelty-bench/novelty-bench, with columns `id` and `prompt`.
Eleven of them have a finite set of answers, which stands here (ANSWERS). Both runs train on those, from the weights as
they are: a completion that names exactly one answer has reward 1, others 0. Then all three policies are measured:

  all       all prompts, ten completions of at most 48 tokens: distinct of 10 by ROUGE-1, utility with the grammar model
            as its scorer (mara_jax.tasks.rewards.grammar:kept, 0 to 1; the benchmark's own is a reward model of 8B),
            expectation-adjusted distinct n-grams, embedding distance
  finite    the eleven, 64 completions each: the share that names one answer, and the effective number of answers;
            beside it that number at each run's predicted optimum, and what 64 completions of that optimum show of it

The same command goes on where it was stopped. Prints one JSON object a policy, then one a prompt with finite answers,
and their means.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from mara_jax.core import diversity

SUITS = ("hearts", "spades", "diamonds", "clubs")
RANKS = "ace two three four five six seven eight nine ten jack queen king".split()
PRIMES = "2 3 5 7 11 13 17 19 23 29 31 37 41 43 47".split()
BOOKS = """Philosopher's Stone, Chamber of Secrets, Prisoner of Azkaban, Goblet of Fire, Order of the Phoenix,
Half-Blood Prince, Deathly Hallows"""
SPANISH = """Argentina, Bolivia, Chile, Colombia, Costa Rica, Cuba, Dominican Republic, Ecuador, El Salvador, Equatorial
Guinea, Guatemala, Honduras, Mexico, Nicaragua, Panama, Paraguay, Peru, Spain, Uruguay, Venezuela"""
CAPITALS = """Abuja, Accra, Addis Ababa, Algiers, Antananarivo, Asmara, Bamako, Bangui, Banjul, Bissau, Brazzaville,
Cairo, Conakry, Dakar, Djibouti, Dodoma, Freetown, Gaborone, Gitega, Harare, Juba, Kampala, Khartoum, Kigali, Kinshasa,
Libreville, Lilongwe, Lome, Luanda, Lusaka, Malabo, Maputo, Maseru, Mbabane, Mogadishu, Monrovia, Moroni, Nairobi,
N'Djamena, Niamey, Nouakchott, Ouagadougou, Port Louis, Porto-Novo, Praia, Pretoria, Rabat, Sao Tome, Tripoli, Tunis,
Victoria, Windhoek, Yamoussoukro, Yaounde"""
# What else counts as an answer; case, accents, hyphens and the form of an apostrophe never matter.
SPELLINGS = {
    "Philosopher's Stone": ["Sorcerer's Stone"],
    "Richard Wright": ["Rick Wright"],
    "Pretoria": ["Cape Town", "Bloemfontein"],  # South Africa has three
    **{f"{rank} of {suit}": [f"{RANKS.index(rank) + 1} of {suit}"] for rank in RANKS[1:10] for suit in SUITS},
}
# What names no answer though it has the words of one: a die's sides, the number of an item in a list, a state.
NO_ANSWER = [r"\b\d+[- ]sided\b", r"^\s*\d+[.)]\s+(?=\S)", r"\bnew mexico\b"]
# A whole number, not part of another one, of a range, or of a word.
NUMBER = r"(?<![\w-])(?<!\d[.,:/])(?:{})(?![\w-]|[.,:/]\d)"
WORDS = r"(?<![\w-])(?:{})(?!\w)"


def _list(names: str) -> list[str]:
    return [" ".join(name.split()) for name in names.split(",")]


ANSWERS: dict[str, list[str]] = {  # by the id of the prompt
    "curated-47": ["half full", "half empty"],
    "curated-48": ["half full", "half empty"],
    "curated-58": _list(CAPITALS),
    "curated-67": _list(SPANISH),
    "curated-70": _list("Syd Barrett, Roger Waters, Nick Mason, Richard Wright, David Gilmour, Bob Klose"),
    "curated-74": _list(BOOKS),
    "curated-85": [f"{rank} of {suit}" for rank in RANKS for suit in SUITS],
    "curated-87": PRIMES,
    "curated-88": [str(number) for number in range(1, 21)],
    "curated-90": [str(number) for number in range(1, 101)],
    "curated-97": [str(digit) for digit in range(10)],
}
BASE = "smollm2-135m-instruct"
SAMPLES = 64  # of each prompt with finite answers, of the reference and of each policy
RUNS = {"vanilla": ["--config.algorithm.method=vanilla"], "MARA over answers": []}
SETTINGS = [
    "--config=configs/prompts.py", "--config.warmup.steps=0", "--config.evaluation.every=0", "--config.steps=30",
    "--config.optimiser.decay_steps=30", "--config.rollout.max_new_tokens=32", f"--config.reference.samples={SAMPLES}",
    "--config.task.truncated=score",
]  # fmt: skip
OF_ALL = {
    "novelty/distinct_10": "distinct of 10",
    "novelty/utility_10": "utility of 10",
    "ngrams/ead": "EAD",
    "embeddings/distance": "embedding distance",
}
OF_FINITE = {"reward": "names one answer", "answers/effective": "effective answers"}


def which(completion: str, answers: Sequence[str]) -> str | None:
    """The one of a prompt's answers that a completion names, however often; None where it names none or several.

    Numbers are digits: one that is spelled out is none, as "one" and "two" have other meanings.
    """
    text = re.sub("|".join(NO_ANSWER), " ", plain(completion), flags=re.MULTILINE)
    answer_of = {key(form): name for name in answers for form in (name, *SPELLINGS.get(name, ()))}
    longest_first = sorted(answer_of, key=len, reverse=True)
    forms = "|".join(re.escape(form).replace(r"\ ", r"[\s-]+") for form in longest_first)
    pattern = (NUMBER if all(name.isdecimal() for name in answers) else WORDS).format(forms)
    named = {answer_of[key(found)] for found in re.findall(pattern, text)}
    return named.pop() if len(named) == 1 else None


def plain(text: str) -> str:
    """A text without case and accents, with straight apostrophes."""
    letters = unicodedata.normalize("NFKD", text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def key(form: str) -> str:
    """What different forms of an answer share: words between single spaces."""
    return " ".join(re.split(r"[\s-]+", plain(form)))


def names_one(completions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """1 where a completion names exactly one of its prompt's answers, else 0."""
    return [float(which(text, known) is not None) for text, known in zip(completions, answers, strict=True)]


def run(command: str, *flags: str) -> None:
    """Runs a command of the package; ends with its status where that is not 0."""
    words = [sys.executable, "-m", f"mara_jax.{command}", *flags]
    print(" ".join(words), file=sys.stderr, flush=True)
    status = subprocess.run(words, stdout=sys.stderr).returncode
    if status:
        raise SystemExit(status)


def folder_of(name: str) -> str:
    """Of a policy, below --folder."""
    return name.replace(" ", "_")


def trained(folder: pathlib.Path, name: str, finite: pathlib.Path, fields: Sequence[str]) -> pathlib.Path:
    """The run of a method, made or made further where it is not there."""
    workdir, functions = folder / folder_of(name), pathlib.Path(__file__).resolve()
    if not (workdir / "model").exists():
        task = [f"--config.task.prompts={finite}", f"--config.task.reward={functions}:names_one"]
        task += [f"--config.task.answer={functions}:which"]
        run("main", *SETTINGS, *task, *RUNS[name], f"--workdir={workdir}", *fields)
    return workdir


def evaluated(folder: pathlib.Path, name: str, weights: str, prompts: dict[str, pathlib.Path]) -> dict[str, Any]:
    """The measures of a policy: `all` and `finite`."""
    functions = pathlib.Path(__file__).resolve()
    flags = {
        "all": ["--reward=mara_jax.tasks.rewards.grammar:kept", "--embedder=installed", "--samples=10"],
        "finite": [f"--reward={functions}:names_one", f"--answer={functions}:which", f"--samples={SAMPLES}"],
    }
    limit, found = {"all": 48, "finite": 32}, {}
    for which_prompts, file in prompts.items():
        out = folder / "evaluations" / f"{folder_of(name)}-{which_prompts}"
        if not (out / "evaluation.json").exists():
            run(
                "evaluate", "run", f"--weights={weights}", f"--prompts={file}", "--threshold=0.5", f"--out={out}",
                f"--max_new_tokens={limit[which_prompts]}", *flags[which_prompts],
            )  # fmt: skip
        found[which_prompts] = json.loads((out / "evaluation.json").read_text())
    return found


def optima(workdir: pathlib.Path) -> dict[str, list[float]]:
    """The effective number of answers at a run's predicted optimum, and what SAMPLES completions of it show, by prompt.

    A run knows the answers that the reference's samples or the policy gave. To those that only the policy gave it
    grants half a sample each, and names no mass of them: they share what the others leave.
    """
    lines = [json.loads(line) for line in (workdir / "modes.jsonl").read_text().splitlines()]
    return {line["prompt"]: numbers([mode["optimum"] for mode in line["answers"]]) for line in lines}


def numbers(mass_a: Sequence[float | None]) -> list[float]:
    """The effective number of a distribution, and its mean estimate from SAMPLES draws, which cannot show many."""
    known = [mass for mass in mass_a if mass is not None]
    if not known:
        return [float("nan"), float("nan")]
    rest = max(0.0, 1 - sum(known)) / max(1, len(mass_a) - len(known))
    share_a = np.array([rest if mass is None else mass for mass in mass_a])
    share_a /= share_a.sum()
    draws = np.random.default_rng(0).multinomial(SAMPLES, share_a, size=2000)
    return [2 ** diversity.entropy_bits(share_a), float(np.mean([2 ** diversity.entropy_bits(row) for row in draws]))]


def write_prompts(source: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of prompts: all of them, and those with finite answers."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    every = [{"prompt": row["prompt"]} for row in rows]
    finite = [{"prompt": row["prompt"], "answers": ANSWERS[row["id"]]} for row in rows if row["id"] in ANSWERS]
    if len(finite) != len(ANSWERS):
        raise SystemExit(f"{source} has {len(finite)} of the {len(ANSWERS)} prompts with finite answers: give the 100")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"all": folder / "all.jsonl", "finite": folder / "finite.jsonl"}
    for path, chosen in zip(paths.values(), (every, finite), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return paths


def main() -> None:
    """Trains, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    arguments, fields = parser.parse_known_args()
    prompts = write_prompts(arguments.prompts, arguments.folder)
    found = {"base": evaluated(arguments.folder, "base", BASE, prompts)}
    predicted = {}
    for name in RUNS:
        workdir = trained(arguments.folder, name, prompts["finite"], fields)
        found[name], predicted[name] = evaluated(arguments.folder, name, str(workdir), prompts), optima(workdir)
    for name, of in found.items():
        row = {title: [of["all"]["metrics"][key], *of["all"]["intervals"][key]] for key, title in OF_ALL.items()}
        row |= {
            title: [of["finite"]["metrics"][key], *of["finite"]["intervals"][key]] for key, title in OF_FINITE.items()
        }
        print(json.dumps({"policy": name} | {title: np.round(values, 3).tolist() for title, values in row.items()}))
    lines = prompts["finite"].read_text().splitlines()
    rows = [of_prompt(json.loads(line), number, found, predicted) for number, line in enumerate(lines)]
    for row in rows:
        print(json.dumps(row))
    known = [row for row in rows if not any(np.isnan(row[f"optimum: {name}"]).any() for name in RUNS)]
    means = {key: np.round(np.mean([row[key] for row in known], axis=0), 2).tolist() for key in list(rows[0])[2:]}
    print(json.dumps({"mean of prompts with an optimum": len(known)} | means))


def of_prompt(prompt: dict[str, Any], number: int, found: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """OF_FINITE of one prompt, by each policy, and `numbers` of the optima."""
    row: dict[str, Any] = {"prompt": prompt["prompt"], "answers": len(prompt["answers"])}
    for name, of in found.items():
        measured = of["finite"]["prompts"][number]
        row[name] = [round(measured[key], 2) for key in OF_FINITE]
        if name in predicted:
            row[f"optimum: {name}"] = np.round(predicted[name][prompt["prompt"]], 2).tolist()
    return row


if __name__ == "__main__":
    main()
