"""Says where a configuration's optimum is before it is trained: will it collapse, and what would MARA give instead?

    python -m mara_jax.predict --config=configs/FILE.py[:VARIANT] [--config.x.y=VALUE] [--samples=N]
    python -m mara_jax.predict --run=WORKDIR [--samples=N] [--beta=0.1 --threshold=0.8 --kl=forward --method=answers]
    python -m mara_jax.predict --rows=FILE.csv|FILE.jsonl [--prompt=I] [--beta --threshold --kl --method]

Each with [--out=DIR] (picture and numbers) and [--json] (the numbers on stdout). Rows hold ref_logp (nats, may be
empty), reward, answer (empty or null: none), and prompt where there are several (an index; left out: 0).
"""

import contextlib
import math
import os
import pathlib
import sys
from typing import Any

from absl import flags, logging
from ml_collections import config_flags
from rich.console import Console

from mara_jax import cli, config
from mara_jax.core import forecast
from mara_jax.predict import drawing, draws, prediction

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:VARIANT", lock_config=True, flag_values=FLAGS)
_TEXTS = {
    "run": "Workdir of a run: its config, and the samples that measured its reference.",
    "rows": "CSV or JSONL file with ref_logp, reward, answer.",
    "kl": "reverse or forward.",
    "method": "vanilla, or MARA over answers or strings.",
    "out": "Folder for prediction.json, prediction.png and prediction.svg.",
}
_NUMBERS = {"beta": "Weight of the KL, reward units per nat.", "threshold": "Reward from which a completion is good."}
for _name, _help in _TEXTS.items():
    flags.DEFINE_string(_name, None, _help, flag_values=FLAGS)
for _name, _help in _NUMBERS.items():
    flags.DEFINE_float(_name, None, _help, flag_values=FLAGS)
flags.DEFINE_integer("samples", None, "Draws of the reference (default: warmup.measure_samples).", flag_values=FLAGS)
flags.DEFINE_integer("prompt", 0, "Which of the prompts, of the task or of the rows.", flag_values=FLAGS)
flags.DEFINE_integer("resamples", forecast.RESAMPLES, "Resamples of the bootstrap.", flag_values=FLAGS)
flags.DEFINE_boolean("json", False, "Print the numbers instead of the table.", flag_values=FLAGS)

OBJECTIVE = ("method", "kl", "beta", "threshold")
DEFAULT = prediction.Settings("vanilla", "reverse", 0.1, 0.8)  # of rows


def _flag(name: str) -> Any:
    return FLAGS[name].value


def main(argv: list[str]) -> int:
    """Predicts what the flags ask for; returns the exit status."""
    try:
        source = parse(argv)
        logging.set_verbosity(logging.ERROR)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        # Only the prediction goes to stdout; what is said on the way there goes beside it.
        with contextlib.redirect_stdout(sys.stderr):
            drawn, settings = gather(source)
            found = prediction.predict(drawn, settings, resamples=_flag("resamples"))
            picture = drawing.write(found, pathlib.Path(_flag("out"))) if _flag("out") else None
    except (ValueError, OSError, flags.Error) as error:
        print(f"mara_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mara_jax: interrupted; nothing was written", file=sys.stderr)
        return 130
    if _flag("json"):
        print(drawing.to_json(found))
        return 0
    console = Console(soft_wrap=True, highlight=False)
    drawing.show(found, console)
    console.print(f"picture: {picture}" if picture else "--out=DIR writes the picture and all numbers", markup=False)
    return 0


def parse(argv: list[str]) -> str:
    """Reads the flags; returns the one of config, run and rows that was given.

    Raises:
      ValueError: a flag is missing, unknown, out of its range, or of no use beside the others.
    """
    cli.read_flags(FLAGS, argv)
    given = {name for name in FLAGS if FLAGS[name].present}
    sources = [name for name in ("config", "run", "rows") if name in given]
    if len(sources) != 1:
        raise ValueError(
            f"give one of --config=FILE.py, --run=WORKDIR and --rows=FILE, not {' and '.join(sources) or 'none'}: "
            "python -m mara_jax.predict --config=configs/onetwo.py:nano"
        )
    for name in OBJECTIVE:
        if sources == ["config"] and name in given:
            raise ValueError(f"--{name} is for --run and --rows: with --config use --config.algorithm.{name}")
    if sources == ["rows"] and "samples" in given:
        raise ValueError("--samples has no meaning with --rows: the file's rows are the draws")
    for name, least in (("resamples", 100), ("samples", 2), ("prompt", 0)):
        value = _flag(name)
        if value is not None and value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")
    for name, known in (("kl", ("reverse", "forward")), ("method", tuple(prediction.OBJECTIVES))):
        if _flag(name) not in (None, *known):
            raise ValueError(f"--{name}={_flag(name)} is unknown: choose {' or '.join(known)}")
    if _flag("beta") is not None and not 0 < _flag("beta") < float("inf"):
        raise ValueError(f"--beta={_flag('beta')} must be positive: try 0.1")
    if _flag("threshold") is not None and not math.isfinite(_flag("threshold")):
        raise ValueError(f"--threshold={_flag('threshold')} must be a finite reward: try 0.8")
    return sources[0]


def gather(source: str) -> tuple[prediction.Draws, prediction.Settings]:
    """The draws and the objective that the flags ask for."""
    samples, prompt = _flag("samples"), _flag("prompt")
    if source == "config":
        run = config.resolve(_flag("config"))
        drawn = draws.of_toy(run) if isinstance(run, config.ToyRun) else draws.of_config(run, samples, prompt)
        return drawn, draws.settings_of(run)
    if source == "run":
        drawn, run = draws.of_run(pathlib.Path(_flag("run")), samples, prompt)
        settings = draws.settings_of(run)
    else:
        drawn = draws.read_rows(pathlib.Path(_flag("rows")), prompt=prompt if FLAGS["prompt"].present else None)
        settings = DEFAULT
    asked = {name: _flag(name) for name in OBJECTIVE if _flag(name) is not None}
    if "method" in asked:
        asked["objective"] = asked.pop("method")
    return drawn, settings._replace(**asked)
