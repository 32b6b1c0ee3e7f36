"""The same run by one process and by several over loopback: python processes_program.py ARGUMENTS OUT.

ARGUMENTS (JSON): as of layouts_program, without layouts and nudges, and jobs: lists of (number of processes, mesh sizes
or null).
Processes are forks of this one, which has imported everything but not touched a device, so imports are paid for once.
Of each job, OUT/number holds: i.json, what process i saw; i.said, what it wrote to its terminal; metrics.jsonl and
model, which all of them write. The exit statuses are printed as JSON.
"""

import json
import os
import pathlib
import socket
import sys
import traceback

import layouts_program
import transformers

from mara_jax import hf
from mara_jax.hf import tokenizer  # noqa: F401 - imported on demand elsewhere
from mara_jax.parallel import hosts, joining, watch
from mara_jax.parallel.meeting import Place
from mara_jax.train import metrics

assert transformers.PreTrainedTokenizerFast  # imported on demand, too


def process(asked: dict, sizes: list[int] | None, out: pathlib.Path, address: str | None, number: int, index: int):
    """In a fork: one of `number` processes of a job."""
    if number > 1:
        joining.join(Place(address, number, index), timeout=0)
    log = metrics.Log(out / "metrics.jsonl", 0, keeps=hosts.is_process_zero())
    found = layouts_program.train(
        layouts_program.run_of(asked),
        sizes,
        asked["steps"],
        lambda setup, state, _: hf.export(setup.policy, state.params, out / "model"),
    )
    for row in found["rows"]:
        log.write(row)
    log.close()
    (out / f"{index}.json").write_text(json.dumps(found))


def forked(index: int, out: pathlib.Path, *rest) -> int:
    """The process id of a fork that ends as a process does, its words kept in a file."""
    started = os.fork()
    if started:
        return started
    said = os.open(out / f"{index}.said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        process(*rest, index)
    except BaseException:
        traceback.print_exc()
        watch.end_at_once(1)
    sys.exit(0)


def main() -> None:
    asked, statuses = json.loads(sys.argv[1]), []
    layouts_program.add_flags(layouts_program.PATIENCE)
    for number, sizes in asked["jobs"]:
        out = pathlib.Path(sys.argv[2]) / str(number)
        out.mkdir()
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        job = [forked(index, out, asked, sizes, out, address, number) for index in range(number)]
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in job])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
