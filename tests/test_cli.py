"""What commands share: --help, --version, the list of commands, refusals in one line, exit statuses, closed pipes."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

import mara_jax
from mara_jax import cli, config
from mara_jax.cli import Command, Flag
from mara_jax.config import LanguageRun, Limit, ToyRun

ROOT = pathlib.Path(__file__).parents[1]
ANY_CONFIG = Command("main", "", ("",), configs=(LanguageRun, ToyRun))


def started(*words: str, columns: int = 80, **options) -> subprocess.Popen:
    """`python -m mara_jax...` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env=os.environ | {"COLUMNS": str(columns)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def command_of(name: str) -> Command:
    return importlib.import_module("mara_jax.main" if name == "main" else f"mara_jax.{name}.command").COMMAND


# ---- --help, --version, the list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_purpose_examples_flags_and_every_field(command, name):
    done = command(f"mara_jax.{name}", "--help")
    assert done.returncode == 0 and done.stderr == ""
    shown, lines = command_of(name), done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(done.stdout.split())
    assert " ".join(shown.purpose.split()) in text and all(f"  {example}" in lines for example in shown.examples)
    for flag in shown.flags:
        assert any(line.startswith(f"  --{flag.name}") for line in lines)
        assert flag.meaning in text and (flag.default in (None, False) or f"default {flag.default}" in text)
    for kind in shown.configs:
        listed_before = {setting.name for setting in config.settings(LanguageRun()) if kind is not LanguageRun}
        for setting in config.settings(kind()):
            assert f"{setting.name} = " in text
            if setting.name not in listed_before:
                words = (setting.allowed.words,) if isinstance(setting.allowed, Limit) else setting.allowed or ()
                assert all(word in text for word in (setting.meaning, *words))


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_every_command_tells_its_version(command, name):
    done = command(f"mara_jax.{name}" if name else "mara_jax", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mara_jax {mara_jax.__version__}\n", "")


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_the_package_lists_its_commands_and_no_others(command, flags):
    done = command("mara_jax", *flags)
    assert done.returncode == 0
    listed = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("  python -m ")]
    modules = {path.parent.name for path in (ROOT / "mara_jax").glob("*/__main__.py")} | {"main"}
    assert listed == [f"mara_jax.{name}" for name in cli.COMMANDS] and set(cli.COMMANDS) == modules
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_command_after_the_package_is_pointed_at(command):
    done = command("mara_jax", "predict", "--help-me")
    assert done.returncode == 2 and "python -m mara_jax.predict" in done.stderr and done.stderr.count("\n") == 1


def test_help_with_a_config_shows_its_values():
    argv = ["main", "--config=configs/onetwo.py:nano", "--help"]
    text = cli.help_text(command_of("main"), argv)
    assert "with the values of configs/onetwo.py:nano" in text
    assert "  rollout.max_new_tokens = 56\n" in text and "  task.malformed = 0.25\n" in text
    toy = cli.help_text(command_of("main"), ["main", "--config", "configs/toy.py:sweep", "--help"])
    assert "  toy.figure = 2\n" in toy and "  sweep.seeds = 4\n" in toy and "rollout" not in toy.split("Fields")[1]


def test_help_fits_narrow_terminals(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = cli.help_text(command_of("main"), ["main", "--help"]).splitlines()
    assert max(len(line) for line in lines if "python -m" not in line) <= 60


def test_importing_the_training_command_and_its_config_needs_no_jax():
    program = "import sys; from mara_jax import main; main.COMMAND.configs[0](); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# ---- refusals and exit statuses -------------------------------------------------------------------------------------


FLAGS = (
    Flag("size", "N", "", 3, int, least=1, most=9),
    Flag("kind", "KIND", "", choices=("a", "b")),
    Flag("out", "DIR", ""),
)
SMALL = Command("bench", "", ("bench --out=x",), flags=FLAGS, required=("out",))


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--out=x", "--size=0"], "--size=0 must be at least 1 and at most 9"),
        (["--out=x", "--size=10"], "--size=10 must be at least 1 and at most 9"),
        (["--out=x", "--size=few"], "--size=few"),
        (["--out=x", "--kind=c"], "--kind=c is unknown: choose one of a, b"),
        (["--out=x", "--sise=2"], "Unknown command line flag 'sise'. Did you mean: size ?"),
        (["--out=x", "word"], "unexpected argument 'word': every setting is a flag, --name=value"),
        ([], "--out is missing, as in bench --out=x"),
    ],
)
def test_flags_are_checked_in_one_line(words, answer, capsys):
    assert cli.run(SMALL, lambda argv: len(cli.parse(SMALL, argv)), ["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mara_jax: ") and err.count("\n") == 1 and answer in err


def test_flags_have_their_values_and_defaults():
    values = cli.parse(SMALL, ["bench", "--out", "x", "--size=4"])
    assert (values.out, values.size, values.kind) == ("x", 4, None)
    assert values["size"].present and not values["kind"].present
    assert cli.parse(SMALL, ["bench", "--out=x"]).size == 3
    shown = Command("evaluate", "", ("",), flags=FLAGS, arguments="show RUN")
    values, arguments = cli.parse_with_arguments(shown, ["evaluate", "show", "--size=2", "run"])
    assert arguments == ["show", "run"] and values.size == 2


@pytest.mark.parametrize(
    ("error", "status", "answer"),
    [
        (ValueError("two\nlines"), 2, "mara_jax: two lines\n"),
        (FileNotFoundError("no file"), 2, "mara_jax: no file\n"),
        (KeyboardInterrupt(), 130, "mara_jax: interrupted; nothing was written\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_exit_statuses(error, status, answer, capfd):
    def fail(argv):
        raise error

    kept = os.dup(1)  # the closed pipe replaces the process's stdout
    assert cli.run(SMALL, fail, ["bench"]) == status
    os.dup2(kept, 1)
    os.close(kept)
    assert capfd.readouterr().err == answer


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(SMALL, lambda argv: 1 // 0, ["bench"])


@pytest.mark.parametrize("words", [["mara_jax.main", "--help"], ["mara_jax.evaluate", "--version"], ["mara_jax"]])
def test_a_closed_pipe_is_no_traceback(words):
    process = started(*words)
    process.stdout.close()  # as `| head -0` does
    assert process.wait(timeout=120) == cli.CLOSED_PIPE
    assert process.stderr.read() == ""


# ---- --config and its overrides -------------------------------------------------------------------------------------

SET = "from mara_jax.config import *\ndef get_config():\n    return "
TOY = SET + "to_config_dict(ToyRun())"


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        (TOY, "--config=FILE --config.toy.batch=4", None),
        (TOY, "--config FILE --config.toy.batch=4", None),
        (TOY, "-config FILE -config.toy.batch 4", None),
        (TOY, "--config=FILE --config.rollout.group_size=4", "unknown config field 'rollout.group_size'"),
        (TOY, "--config=FILE -config.toy.bach=4", "unknown config field 'toy.bach': toy has no 'bach'; it has figure"),
        (TOY, "--config=FILE --noconfig.toy.exakt", "unknown config field 'toy.exakt'"),
        (SET + "ToyRun()", "--config=FILE", None),
        (SET + "ToyRun()", "--config=FILE --config.steps=3", "to_config_dict(run)"),
        (SET + "None", "--config=FILE", "a config is to_config_dict(LanguageRun(...)) or of a ToyRun, not None"),
        ("x = 1", "--config=FILE", "the config file has no function get_config(variant)"),
        (SET + "int('ten')", "--config=FILE", "invalid literal for int() with base 10: 'ten'"),
    ],
)
def test_overrides_are_checked_against_the_config_that_was_loaded(monkeypatch, tmp_path, text, flags, words):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # one process loads one config, not eleven
    file = tmp_path / "mine.py"
    file.write_text(text)
    argv = ["main", *flags.replace("FILE", str(file)).split()]
    if words is None:
        values = cli.parse(ANY_CONFIG, argv)
        run = config.resolve(values["config"].value)
        assert isinstance(run, ToyRun) and run.toy.batch == (4 if "batch" in flags else 32)
        return
    with pytest.raises(ValueError) as caught:
        cli.parse(ANY_CONFIG, argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)
