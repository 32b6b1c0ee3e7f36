"""Counted calls: what is charged, the budget's last call, the cache, failures, worker processes, and checkpoints."""

import functools
import json
import os
import pickle
import sys
import textwrap
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mara_jax.tasks.chemistry import oracles
from mara_jax.tasks.chemistry.calls import OracleCalls, OracleError, Processes
from mara_jax.tasks.chemistry.program import Program

CHAIN = ["C" * length for length in range(1, 13)]  # methane to dodecane
MODULE = '''
import os, time

def length(smiles):
    """Slow for short molecules, so that later ones are ready first."""
    time.sleep(max(0, .2 - .05 * len(smiles[0])))
    return [len(one) for one in smiles]

def process(smiles):
    time.sleep(.2)
    return [float(os.getpid())] * len(smiles)

class Wrapped:
    """Hides a program, so that its limit cannot be compared with that of the worker."""

    def __init__(self, program):
        self.program = program

    def __call__(self, smiles):
        return self.program(smiles)

def odd(smiles):
    for one in smiles:
        if one == "O": raise RuntimeError("two\\nlines")
        if one == "N": time.sleep(1000)
        if one == "S": os._exit(3)
    return [float("nan") if one == "F" else None if one == "Cl" else len(one) for one in smiles]
'''


class Counting:
    """Scores a molecule by its length, and keeps what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, smiles):
        self.asked += smiles
        return [len(one) / 10 for one in smiles]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A module that worker processes can import."""
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "oracle_of_test.py").write_text(textwrap.dedent(MODULE))
    sys.path.insert(0, str(folder))
    import oracle_of_test  # type: ignore[import-not-found]

    yield oracle_of_test
    sys.path.remove(str(folder))


def test_two_spellings_of_a_molecule_are_one_call():
    oracle = Counting()
    calls = OracleCalls(oracle)
    assert calls(["OCC", "C", "CCO"]).values == [0.3, 0.1, 0.3]
    assert oracle.asked == ["CCO", "C"] and (calls.calls, calls.repeats) == (2, 1)
    later = calls(["C(C)O", "C", "CC"])
    assert later == ([0.3, 0.1, 0.2], 1, 0) and oracle.asked == ["CCO", "C", "CC"]
    assert (calls.calls, calls.repeats, calls.remaining) == (3, 3, 9_997)
    assert calls.series == {"CCO": 0.3, "C": 0.1, "CC": 0.2}


def test_stereoisomers_are_different_molecules():
    calls = OracleCalls(Counting())
    calls(["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "CC(N)C(=O)O"])
    assert calls.calls == 3


def test_invalid_molecules_score_0_and_cost_nothing():
    calls = OracleCalls(Counting(), budget=1)
    assert calls(["c1ccc", "", "C", "nothing"]) == ([0, 0, 0.1, 0], 1, 0)
    assert (calls.calls, calls.invalid, calls.refused) == (1, 3, 0)
    assert calls(["c1ccc"]) == ([0], 0, 0) and calls.invalid == 4


@pytest.mark.parametrize("per_call", [1, 4, 100])
def test_the_budget_is_exact_to_the_call(per_call):
    oracle = Counting()
    calls = OracleCalls(oracle, budget=7, processes=Processes(molecules=per_call))
    assert calls(CHAIN[:5]).beyond == 0
    # Two calls are left: for hexane and heptane; octane stands twice, methane is known.
    batch = calls([CHAIN[5], "C", "c1ccc", CHAIN[6], CHAIN[7], CHAIN[7], CHAIN[8]])
    assert batch.values == [0.6, 0.1, 0, 0.7, None, None, None]
    assert (batch.charged, batch.beyond) == (2, 2)
    assert (calls.calls, calls.remaining, calls.refused, calls.repeats, calls.invalid) == (7, 0, 3, 1, 1)
    assert oracle.asked == CHAIN[:7]
    assert calls([CHAIN[9], CHAIN[0]]) == ([None, 0.1], 0, 1) and len(oracle.asked) == 7


def test_a_run_that_is_restored_goes_on_as_the_one_that_was_not_stopped():
    batches = [["OCC", "C", "c1ccc"], ["CCO", "CC", "CCC"], ["C", "N", "CCCC", "CCCCC"]]
    whole = OracleCalls(Counting(), budget=6, name="length")
    expected = [whole(batch) for batch in batches]

    first = OracleCalls(Counting(), budget=6, name="length")
    assert [first(batch) for batch in batches[:2]] == expected[:2]
    oracle = Counting()
    second = OracleCalls(oracle, budget=6, name="length")
    second.restore(json.loads(json.dumps(first.state())))
    assert second(batches[2]) == expected[2] and oracle.asked == ["N", "CCCC"]
    assert second.state() == whole.state()
    assert list(second.series.items()) == list(whole.series.items())  # in the order of calls


def test_states_that_do_not_fit_are_refused():
    calls = OracleCalls(Counting(), name="length")
    calls(CHAIN)
    state = calls.state()
    for other, message in (
        (OracleCalls(Counting(), budget=11, name="length"), "has 12 calls, more than budget=11"),
        (OracleCalls(Counting(), name="qed"), "of the oracle 'length', and this one is 'qed'"),
    ):
        with pytest.raises(ValueError, match=message):
            other.restore(state)
    with pytest.raises(ValueError, match="version 2"):
        OracleCalls(Counting(), name="length").restore({**state, "version": 2})


@pytest.mark.parametrize(("budget", "failure_value"), [(0, None), (1, float("nan"))])
def test_settings_that_cannot_be_are_refused(budget, failure_value):
    with pytest.raises(ValueError, match="give"):
        OracleCalls(Counting(), budget, failure_value=failure_value)


def test_the_oracle_may_return_an_array():
    assert OracleCalls(lambda smiles: np.arange(len(smiles)), processes=Processes(molecules=9))(CHAIN[:3]).values == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("molecule", "why"),
    [
        ("O", r"RuntimeError: two lines \(.*oracle_of_test.py, line \d+\)"),
        ("F", "it returned nan, which is no finite number"),
        ("Cl", "it returned None, which is no finite number"),
    ],
)
@pytest.mark.parametrize(("count", "per_call"), [(0, 1), (0, 8), (1, 8)])
def test_a_failure_names_the_molecule(odd, molecule, why, count, per_call):
    processes = Processes(count, molecules=per_call)
    with OracleCalls(odd.odd, processes=processes) as calls:
        with pytest.raises(OracleError, match=rf"^the oracle fails at {molecule}: {why}$") as error:
            calls(["C", molecule, "CC"])
        assert error.value.smiles == molecule
        assert calls.series == {"C": 1}  # what came before is kept, and the failure is not charged

    with OracleCalls(odd.odd, processes=processes, failure_value=-1.0) as lenient:
        assert lenient(["C", molecule, "CC", molecule]) == ([1, -1, 2, -1], 3, 0)
        assert lenient.failed == [molecule] == lenient.state()["failed"]


def test_a_failure_can_be_sent_to_other_processes():
    error = pickle.loads(pickle.dumps(OracleError("CCO", "it returned nan")))
    assert (type(error), error.smiles, error.why) == (OracleError, "CCO", "it returned nan")
    assert str(error) == "the oracle fails at CCO: it returned nan"


def test_a_wrong_number_of_values_is_a_failure():
    with pytest.raises(OracleError, match="fails at C: it returned 2 values for 1 molecules"):
        OracleCalls(lambda smiles: [1, 2])(["C"])


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (None, "it returned None in place of a list of numbers"),
        (0.5, "it returned 0.5 in place of a list of numbers"),
        ([1e39], r"it returned 1e\+39, which is no finite number of 32 bits"),
    ],
)
def test_what_is_no_list_of_numbers_is_a_failure(returned, why):
    with pytest.raises(OracleError, match=f"^the oracle fails at C: {why}$"):
        OracleCalls(lambda smiles: returned)(["C"])
    assert OracleCalls(lambda smiles: returned, failure_value=0.0)(["C"]).values == [0]


def test_worker_processes_give_results_in_order(odd):
    with OracleCalls(odd.length, processes=Processes(2)) as calls:
        assert calls(CHAIN).values == list(range(1, 13))
        assert list(calls.series) == CHAIN
    with OracleCalls(odd.process, processes=Processes(2)) as calls:
        assert len(set(calls(CHAIN[:6]).values) - {os.getpid()}) == 2


def test_worker_processes_compute_the_table_and_are_sent_programs(tmp_path):
    smiles = ["CC(=O)Oc1ccccc1C(=O)O", "c1ccccc1", "CCO"]
    with OracleCalls(oracles.ORACLES["median1"], processes=Processes(1, molecules=2)) as calls:
        assert calls(smiles).values == oracles.score("median1", smiles)
    (tmp_path / "length.py").write_text("import sys\nfor line in sys.stdin: print(len(line) - 1)")
    with OracleCalls(Program((sys.executable, str(tmp_path / "length.py"))), processes=Processes(1)) as calls:
        assert calls(["CCO", "C"]).values == [3, 1]


def test_a_molecule_at_which_the_oracle_hangs_or_dies_is_found_among_others(odd):
    with OracleCalls(odd.odd, processes=Processes(2, seconds=1, molecules=3), failure_value=0.0) as calls:
        start = time.monotonic()
        assert calls(["C", "N", "CC", "S", "CCC", "O"]).values == [1, 0, 2, 0, 3, 0]
        assert calls.failed == ["N", "S", "O"] and time.monotonic() - start < 30
        assert calls(["CCCC", "N"]).values == [4, 0]  # its workers go on
    with OracleCalls(odd.odd, processes=Processes(1, seconds=1)) as calls:
        with pytest.raises(OracleError, match="fails at N: did not return within 1 s"):
            calls(["C", "N"])
        with pytest.raises(OracleError, match="fails at S: its process ended with status 3"):
            calls(["S"])
        assert calls.series == {"C": 1}


def test_closing_does_not_wait_for_calls_in_flight(odd):
    calls = OracleCalls(odd.odd, processes=Processes(2, molecules=3), failure_value=0.0)
    with ThreadPoolExecutor(1) as thread:
        batch = thread.submit(calls, ["C", "N", "CC", "N", "CCC", "CCCC", "CCCCC", "CCCCCC"])
        time.sleep(0.5)
        began = time.monotonic()
        calls.close()
        assert time.monotonic() - began < 10  # the call in flight has a limit of 60 s, and one more for each molecule
        with pytest.raises(CancelledError):
            batch.result()
    assert calls.failed == []  # what was stopped has not failed


def test_an_error_does_not_wait_for_calls_in_flight(odd):
    with OracleCalls(odd.odd, processes=Processes(2)) as calls:
        began = time.monotonic()
        with pytest.raises(OracleError, match="fails at O"), calls:
            calls(["O", "N"])  # the second sleeps
        assert time.monotonic() - began < 10


def runs(number: int) -> bool:
    """Whether a process is there and has not ended; an ended one may wait for its parent."""
    stat = Path(f"/proc/{number}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


@pytest.mark.parametrize(
    ("program_seconds", "worker_seconds", "message"),
    [(1, 30, "sh .* did not end within 1 s"), (1000, 1, "did not return within 1 s"), (1000, 500, None)],
)
def test_a_program_that_hangs_in_a_worker_leaves_no_process(odd, tmp_path, program_seconds, worker_seconds, message):
    """Ended by its own limit, by that of its worker, and by closing."""
    script = tmp_path / "hang.sh"
    script.write_text(f"sleep 1000 &\necho $! $$ > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/numbers\nwait\n")
    program = Program(("sh", str(script)), program_seconds)
    oracle = program if program_seconds < worker_seconds else odd.Wrapped(program)
    calls = OracleCalls(oracle, processes=Processes(1, seconds=worker_seconds))
    with calls, ThreadPoolExecutor(1) as thread:
        batch = thread.submit(calls, ["C"])
        while not (tmp_path / "numbers").exists():
            time.sleep(0.02)
        time.sleep(0.5)  # until the worker, too, knows that its program has started
        numbers = [int(number) for number in (tmp_path / "numbers").read_text().split()]
        if message:
            with pytest.raises(OracleError, match=f"fails at C: {message}"):
                batch.result()
        else:
            calls.close()
    assert [number for number in numbers if runs(number)] == []


def test_a_program_must_have_less_time_than_the_worker_that_calls_it():
    with pytest.raises(ValueError, match=r"600 s.* 60 s.*Processes\(seconds=") as error:
        OracleCalls(Program(("dock",), seconds=600), processes=Processes(1, seconds=60))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"1 s.*1 s"):
        OracleCalls(Program(("dock",), seconds=1), processes=Processes(1, seconds=1))
    OracleCalls(Program(("dock",), seconds=600))  # without workers only its own limit counts


def test_an_oracle_may_hold_a_text_that_names_the_running_script():
    program = Program(("docker/__main__.py", "__main__"))
    with OracleCalls(program, processes=Processes(1)) as calls, pytest.raises(OracleError, match="cannot be started"):
        calls(["C"])


def test_what_worker_processes_cannot_be_given_is_refused():
    with pytest.raises(ValueError, match="use a function of a module"):
        OracleCalls(lambda smiles: [1], processes=Processes(1))
    main = type("Main", (), {"__module__": "__main__", "__call__": lambda self, smiles: [1]})
    sys.modules["__main__"].Main = main  # type: ignore[attr-defined]
    try:
        main.__qualname__ = "Main"
        with pytest.raises(ValueError, match="put the oracle into a module of its own"):
            OracleCalls(main(), processes=Processes(1))
        with pytest.raises(ValueError, match="put the oracle into a module of its own"):
            OracleCalls(functools.partial(main(), 1), processes=Processes(1))
    finally:
        del sys.modules["__main__"].Main  # type: ignore[attr-defined]
