"""REINVENT's usual policy, a recurrent network in plain torch, beside this package's transformer of the same size.

  python benchmarks/reinvent_vs_gru.py --out=runs/gru --weights=runs/prior/model

First trains the network (three GRU layers, 256 wide, 1.1 million parameters) on the molecules of `python -m
mara_jax.prior`, in the same order and batches of 64, and says how many of 1,000 written molecules are valid as it goes:
evaluations.jsonl of a prior's WORKDIR has those of the transformer. Then times steps of REINVENT of both, 64 molecules
each, in turns, one thread a side: prints medians of seconds for sampling and update (the prior's likelihood included,
the oracle left out) and the tokens of a molecule. The weights are kept in OUT: started again, the script only times.
"""

import argparse
import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils import rnn

from mara_jax.hf import smiles_tokenizer
from mara_jax.prior.batches import TrainingSet
from mara_jax.prior.settings import Settings
from mara_jax.tasks.chemistry import moses, named_oracles, smiles_file

GROUP, LONGEST, SIGMA, ORACLE = 64, 100, 128.0, "molexp:AP"
TURNS, STEPS, FIRST = 3, 12, 4  # steps of a turn; those before the FIRST-th of ours compile
EMBEDDING, HIDDEN, LAYERS = 128, 256, 3


class Network(torch.nn.Module):
    """Next-token logits of SMILES."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, EMBEDDING)
        self.layers = torch.nn.GRU(EMBEDDING, HIDDEN, LAYERS, batch_first=True)
        self.head = torch.nn.Linear(HIDDEN, vocabulary)

    def forward(self, tokens_bt: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits [b, t, vocabulary], and the state after the last token."""
        hidden, state = self.layers(self.embedding(tokens_bt), state)
        return self.head(hidden), state


class Language:
    """The tokens of a training set, as ids that torch reads."""

    def __init__(self, molecules: TrainingSet) -> None:
        self.ids = molecules.tokenizer.get_vocab()
        self.names = {number: name for name, number in self.ids.items()}
        self.bos, self.eos = self.ids[smiles_tokenizer.BOS], self.ids[smiles_tokenizer.EOS]

    def text(self, row: list[int]) -> str:
        """The SMILES of a row; "" where it has no end."""
        return "".join(self.names[one] for one in row[: row.index(self.eos)]) if self.eos in row else ""


def sampled(network: Network, language: Language, count: int) -> torch.Tensor:
    """[count, t] drawn tokens, up to LONGEST; behind an end stand ends."""
    token, state, rows = torch.full((count, 1), language.bos), None, []
    ended = torch.zeros(count, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(LONGEST):
            logits, state = network(token, state)
            token = torch.multinomial(logits[:, -1].softmax(-1), 1)
            token[ended] = language.eos
            rows.append(token)
            ended |= token[:, 0] == language.eos
            if ended.all():
                break
    return torch.cat(rows, dim=1)


def log_likelihood(network: Network, language: Language, tokens_bt: torch.Tensor, lengths_b: torch.Tensor):
    """[b] nats of rows of tokens, each up to its length; the padding is not computed."""
    shifted = functional.pad(tokens_bt[:, :-1], (1, 0), value=language.bos)
    packed = rnn.pack_padded_sequence(network.embedding(shifted), lengths_b, batch_first=True, enforce_sorted=False)
    hidden, _ = network.layers(packed)
    targets = rnn.pack_padded_sequence(tokens_bt, lengths_b, batch_first=True, enforce_sorted=False).data
    logp = functional.log_softmax(network.head(hidden.data), dim=-1).gather(1, targets[:, None])[:, 0]
    logp_bt, _ = rnn.pad_packed_sequence(hidden._replace(data=logp), batch_first=True)
    return logp_bt.sum(1)


def lengths_of(tokens_bt: torch.Tensor, eos: int) -> torch.Tensor:
    """[b] tokens up to the first end, which counts."""
    return ((tokens_bt == eos).cumsum(1) == 0).sum(1).clamp(max=tokens_bt.shape[1] - 1) + 1


def trained(molecules: TrainingSet, language: Language, tokens: int, every: int) -> Network:
    """A network after so many tokens; prints a row whenever `every` more have been read."""
    torch.manual_seed(0)
    network = Network(len(language.ids))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    read, step, since, seconds = 0, 0, 0, 0.0
    while read < tokens:
        started = time.perf_counter()
        batch = molecules.batch(step)
        rows, lengths = torch.tensor(batch.tokens[0], dtype=torch.long), torch.tensor(batch.lengths[0])
        loss = -log_likelihood(network, language, rows[lengths > 0], lengths[lengths > 0].long()).sum() / lengths.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        read, since, step = read + int(lengths.sum()), since + int(lengths.sum()), step + 1
        seconds += time.perf_counter() - started
        if since >= every or read >= tokens:
            texts = [language.text(row) for _ in range(4) for row in sampled(network, language, 250).tolist()]
            row = {"tokens/trained": read, "valid": moses.shares(texts, set())["valid"], "loss": float(loss.detach())}
            print(json.dumps({"network": "gru"} | row | {"tokens/s": round(read / seconds)}), flush=True)
            since = 0
    return network


def gru_steps(network: Network, language: Language) -> list[dict[str, float]]:
    """Seconds of each step of REINVENT."""
    prior, agent, oracle = network, copy.deepcopy(network), named_oracles.named(ORACLE, 60.0)
    optimiser, rows = torch.optim.Adam(agent.parameters(), lr=1e-4), []
    for _ in range(STEPS):
        started = time.perf_counter()
        tokens = sampled(agent, language, GROUP)
        lengths = lengths_of(tokens, language.eos)
        drawn = time.perf_counter()
        texts = [language.text(row) for row in tokens.tolist()]
        score = torch.tensor([moses.shares([text], set())["valid"] and oracle([text])[0] for text in texts])
        scored = time.perf_counter()
        with torch.no_grad():
            wanted = log_likelihood(prior, language, tokens, lengths) + SIGMA * score
        loss = ((wanted - log_likelihood(agent, language, tokens, lengths)) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        update = time.perf_counter() - scored
        rows.append({"sampling_s": drawn - started, "update_s": update, "length": float(lengths.float().mean())})
    return rows


def our_steps(weights: str, workdir: pathlib.Path) -> list[dict[str, float]]:
    """The same of a run of the command, less the steps that compile."""
    shutil.rmtree(workdir, ignore_errors=True)
    command = [sys.executable, "-m", "mara_jax.main", "--config=configs/chemistry.py:molexp", f"--workdir={workdir}"]
    flags = [f"--config.policy.weights={weights}", f"--config.task.oracle={ORACLE}", f"--config.steps={STEPS}"]
    flags += ["--config.algorithm.transform=none", f"--config.checkpoint.every={STEPS}"]
    one_thread = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    pinned = ["taskset", "-c", str(max(os.sched_getaffinity(0)))]
    subprocess.run([*pinned, *command, *flags], env=os.environ | one_thread, stdout=subprocess.DEVNULL, check=True)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][FIRST - 1 : -1]
    return [
        {"sampling_s": row["time/rollout_s"], "update_s": row["time/update_s"], "length": row["length/mean"]}
        for row in rows
    ]


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each number."""
    return {name: round(float(np.median([row[name] for row in rows])), 3) for name in rows[0]}


def main() -> None:
    """Trains and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--smiles", default="moses", help="as of python -m mara_jax.prior")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="that the recurrent network is trained on")
    parser.add_argument("--every", type=int, default=500_000, help="tokens between two counts of valid molecules")
    parser.add_argument("--weights", default="chemistry-prior", help="of the transformer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    molecules = TrainingSet(smiles_file.read(args.smiles, "", "refuse").smiles, Settings(smiles=args.smiles))
    language, path = Language(molecules), args.out / "gru.pt"
    if path.exists():
        network = Network(len(language.ids))
        network.load_state_dict(torch.load(path))
    else:
        network = trained(molecules, language, args.tokens, args.every)
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), path)
    count = sum(one.numel() for one in network.parameters())
    print(json.dumps({"network": "gru", "parameters": count}), flush=True)
    found: dict[str, list[dict[str, float]]] = {"gru": [], "transformer": []}
    for turn in range(TURNS):
        for name, rows in (
            ("gru", gru_steps(network, language)),
            ("transformer", our_steps(args.weights, args.out / "run")),
        ):
            found[name] += rows
            print(json.dumps({"network": name, "turn": turn} | medians(rows)), flush=True)
    for name, rows in found.items():
        print(json.dumps({"network": name, "steps": len(rows)} | medians(rows)))


if __name__ == "__main__":
    main()
