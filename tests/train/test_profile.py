"""Which steps the profiler's window holds."""

import dataclasses

import jax
import pytest

from mara_jax import config
from mara_jax.tasks import onetwo
from mara_jax.train import profile


@pytest.mark.parametrize(
    ("first", "steps", "begin", "last", "traced"),
    [
        (3, 2, 1, 9, [3, 4]),
        (3, 9, 1, 4, [3, 4]),  # the run ends inside the window
        (3, 2, 4, 9, []),  # resumed inside it
        (3, 0, 1, 9, []),
        (12, 2, 1, 9, []),
    ],
)
def test_the_window_holds_the_steps_it_names(monkeypatch, tmp_path, first, steps, begin, last, traced):
    folders, seen, running = [], [], False

    def start(folder):
        nonlocal running
        folders.append(folder)
        running = True

    def stop():
        nonlocal running
        assert running
        running = False

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    window = profile.Window(config.Profile(first=first, steps=steps), tmp_path, last)
    for number in range(begin, last + 1):
        with window.step(number):
            if running:
                seen.append(number)
    assert seen == traced
    assert not running
    assert folders == ([tmp_path / "profile"] if traced else [])


@pytest.mark.parametrize(("field", "value"), [("first", 0), ("steps", -1)])
def test_a_window_that_means_nothing_is_refused(field, value):
    run = config.LanguageRun(
        task=onetwo.Config(), warmup=config.Warmup(steps=1), profile=config.Profile(**{field: value})
    )
    with pytest.raises(ValueError, match=f"profile.{field}={value}"):
        config.check(run)
    config.check(dataclasses.replace(run, profile=config.Profile(first=5, steps=2)))
