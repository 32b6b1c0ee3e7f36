"""Two sides of a benchmark in processes of their own, one thread each, taking turns.

A side is a program that loads what it needs, prints one JSON line, and then prints one more for every line it reads;
at the end of its input it prints a last line and ends. Everything else it says goes to stderr.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import venv

HERE = pathlib.Path(__file__).parent
PEERS = HERE / ".peers"
# prompt tokens, new tokens, completions a prompt, completions
SHAPES = {"balanced": (64, 64, 8, 32), "prompt_heavy": (256, 64, 16, 32), "ragged": (64, 64, 8, 32)}
SHAPES["one_prompt"] = (64, 40, 32, 32)  # as in the 1-2 task
CASES = ("tiny_balanced", "small_balanced", "tiny_prompt_heavy", "tiny_ragged")
MORE_CASES = ("small_prompt_heavy", "small_ragged", "smol_one_prompt")  # smol: SmolLM2-135M and its weights
RAGGED_MEAN = 24  # tokens, were completions not cut: each token ends one with probability 1 / RAGGED_MEAN


def shape(case: str) -> dict:
    """Everything both sides must agree on, from a case's name."""
    model, _, kind = case.partition("_")
    prompt, new, group, samples = SHAPES[kind]
    return {
        "model": model,
        "prompt": prompt,
        "new": new,
        "group": group,
        "samples": samples,
        "ragged": kind == "ragged",
    }


def arguments(doc: str) -> argparse.Namespace:
    """The flags that the comparisons share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[*CASES, *MORE_CASES])
    parser.add_argument("--turns", type=int, default=5, help="of each side, after one that warms up")
    parser.add_argument(
        "--peer-python", help="an interpreter with peers-requirements.txt; by default one is set up here"
    )
    parser.add_argument("--core", type=int, default=0, help="which of the allowed cores both sides run on")
    return parser.parse_args()


def main(file: str, doc: str, what: str, peer: str) -> None:
    """A comparison's command: every case asked for as one JSON line.

    Args:
      file, doc: the script's own, for the records' name and for --help.
      what: our_side.py's word for the work.
      peer: the program of the other side.
    """
    options = arguments(doc)
    python = peer_python(options.peer_python)
    for case in options.case or CASES:
        record = run(case, what, [python, str(HERE / peer)], options.core, options.turns)
        print(json.dumps({"benchmark": pathlib.Path(file).stem, "case": case, **shape(case), **record}), flush=True)


def run(case: str, what: str, peer: list[str], core: int, turns: int) -> dict:
    """`compare` on one case: our model is written for both, and each is told where as its last argument."""
    ours = [sys.executable, str(HERE / "our_side.py")]
    with tempfile.TemporaryDirectory() as folder:
        write = [*ours, "export", case, folder]
        output = subprocess.run(write, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout
        return compare([*ours, what, case, f"{folder}/model"], [*peer, output.strip().splitlines()[-1]], core, turns)


def peer_python(given: str | None) -> str:
    """The peers' interpreter, its environment made beside this file where none is named."""
    if given:
        return given
    python = PEERS / "bin" / "python"
    if not (PEERS / "ready").exists():
        print(f"installing the peers into {PEERS} (a few minutes, once)", file=sys.stderr)
        venv.create(PEERS, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / "peers-requirements.txt")]
        subprocess.run(install, check=True, stdout=sys.stderr)
        (PEERS / "ready").touch()
    return str(python)


def environment() -> dict[str, str]:
    """What a side's process starts with: one thread, this checkout's package, no network."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    flags = "--xla_cpu_multi_thread_eigen=false"
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    return os.environ | threads | quiet | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


class Side:
    """One side's process."""

    def __init__(self, name: str, command: list[str], core: int):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read when the side ends early)
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            preexec_fn=lambda: _pin(core),
        )  # fmt: skip

    def read(self) -> dict:
        """The next line.

        Raises:
          SystemExit: the side ended instead; the end of what it said is shown.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended early:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def turn(self) -> dict:
        """Lets the side do its work once."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> dict:
        """The side's last words."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        last = self.read()
        self.process.wait()
        return last


def _pin(core: int) -> None:
    """One core, so that no library finds a second one to make threads for."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})


def compare(ours: list[str], theirs: list[str], core: int, turns: int) -> dict:
    """Both sides by turns: CPU seconds and phases of every turn, medians' ratio (theirs over ours), peak memory."""
    sides = [Side("mara_jax", ours, core), Side("the peer", theirs, core)]
    started = [side.read() for side in sides]
    first = [side.turn() for side in sides]
    rows: list[list[dict]] = [[], []]
    for _ in range(turns):
        for side, mine in zip(sides, rows, strict=True):
            mine.append(side.turn())
    last = [side.end() for side in sides]
    record = {}
    for name, start, warm, mine, end in zip(("ours", "peer"), started, first, rows, last, strict=True):
        record[name] = {
            "cpu_s": [round(row["cpu_s"], 4) for row in mine],
            "medians": {key: statistics.median(row[key] for row in mine) for key in mine[0]},
            "first_cpu_s": warm["cpu_s"],
            **start,
            **end,
        }
    medians = [record[name]["medians"] for name in ("ours", "peer")]
    return {
        "ratio": medians[1]["cpu_s"] / medians[0]["cpu_s"],
        "memory_ratio": record["ours"]["peak_mib"] / record["peer"]["peak_mib"],
        "load": round(os.getloadavg()[0], 1),
        **record,
    }


def serve(ready: dict, work) -> None:
    """A side's own loop: `work(turn)` returns the numbers of a turn."""
    out = protocol()
    print(json.dumps(ready), file=out, flush=True)
    for turn, _ in enumerate(sys.stdin):
        print(json.dumps(work(turn)), file=out, flush=True)
        if turn == 0:
            forget_peak()
    print(json.dumps(peaks()), file=out, flush=True)


def protocol():
    """What was stdout, for JSON lines alone; whatever else is printed from now on goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


_PEAK: dict[str, float] = {}


def forget_peak() -> None:
    """From here on the peak is that of steps alone: the first one compiles, or fills caches (Linux)."""
    _PEAK["first_peak_mib"] = _high_water_mib()
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peaks() -> dict:
    """Peak memory of the whole process, and of what came after `forget_peak`, MiB."""
    later = _high_water_mib()
    return {"peak_mib": max(later, _PEAK["first_peak_mib"]), "later_peak_mib": later}


def _high_water_mib() -> float:
    # Not getrusage: its peak survives exec, so that a small process started by a large one looks large.
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        import resource

        unit = 1024**2 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def clock() -> float:
    """CPU seconds of this process, all threads."""
    return time.process_time()
