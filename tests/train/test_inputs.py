"""What inputs.json notices: every file, tokenizer, prompt and task that a run depends on."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys

import jax
import pytest

from mara_jax import config, hf
from mara_jax.config import LanguageRun
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks import base, onetwo
from mara_jax.tasks.checked import CheckedTask
from mara_jax.train import inputs
from mara_jax.train import workdir as workdirs

CFG = LanguageRun(task=onetwo.Config(), policy=config.Policy(weights="nano"))
ARCH = transformer.Architecture("qwen2", 512, 16, 1, heads=2, kv_heads=1, head_dim=8, mlp=16)


class Many(base.Task):
    """Prompts with their numbers, of which one may be another."""

    def __init__(self, count: int = 1000, other: int | None = None, file: str | None = None) -> None:
        self.count, self.other, self.file = count, other, file

    def __len__(self) -> int:
        return self.count

    def prompt(self, index: int) -> str:
        return "another" if index == self.other else f"prompt {index}"

    def score(self, prompt_index, texts, finished) -> base.Score:
        return base.Score([0.0] * len(texts), [None] * len(texts))

    def files(self) -> list[str]:
        return [self.file] if self.file else []


def policy(texts=("a text",), **changes) -> Policy:
    """nano's tokenizer from these texts, with no weights."""
    tokenizer = tokenizers.nano(texts)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Policy(ARCH, tokenizer, (2,), 0, {}, "nano")


@pytest.fixture
def weights(tmp_path) -> pathlib.Path:
    """A model's directory."""
    return hf.export(policy(), transformer.init(ARCH, jax.random.key(0)), tmp_path / "base")


def begun(workdir: pathlib.Path, now: inputs.Inputs) -> pathlib.Path:
    """A run that began with these inputs and has a result."""
    workdirs.claim(workdir, CFG)
    inputs.record(workdir, "nano", now)
    (workdir / "reference.json").touch()
    return workdir


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("change", ["a byte", "gone"])
def test_every_file_of_the_weights_counts(tmp_path, weights, name, change):
    workdir = begun(tmp_path / "run", inputs.of_files(CFG, str(weights), inputs.WEIGHTS))
    assert inputs.check(workdir, inputs.of_files(CFG, str(weights), inputs.WEIGHTS)) == []
    if change == "gone":
        (weights / name).rename(tmp_path / name)
        if name == "model.safetensors":
            shutil.copy(tmp_path / name, weights / "other.safetensors")
    else:
        content = bytearray((weights / name).read_bytes())
        content[-2] ^= 1
        (weights / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        inputs.check(workdir, inputs.of_files(CFG, str(weights), inputs.WEIGHTS))
    words = "began with something else (differs in policy.weights/"
    # A folder whose config.json is broken or gone is no model at all: a line says that.
    assert (words if name != "config.json" else "") + name in str(caught.value).replace(f"{weights}/", "")
    assert "\n" not in str(caught.value)


def test_a_digest_is_of_all_bytes_in_their_order(tmp_path, monkeypatch):
    """Of the digests of blocks, by hashlib; any byte of any block counts."""
    monkeypatch.setattr(inputs, "_BLOCK", 4)
    path = tmp_path / "file"

    def of(*blocks: bytes) -> str:
        path.write_bytes(b"".join(blocks))
        parts = b"".join(hashlib.blake2b(block, digest_size=16).digest() for block in blocks)
        assert inputs.digest(path) == hashlib.blake2b(parts, digest_size=16).hexdigest()
        return inputs.digest(path)

    digests = [of(b"abcd", b"efgh", b"i"), of(b"abcd", b"efgh", b"j"), of(b"efgh", b"abcd", b"i"), of(b"abcd"), of(b"")]
    assert len(set(digests)) == 5


@pytest.mark.parametrize(
    ("then", "now", "names"),
    [
        ((Many(), policy()), (Many(), policy(["quite", "other words"])), ["tokenizer"]),
        (
            (Many(), policy()),
            (Many(), policy(chat_template="{{ messages[0]['content'] }}!")),
            ["chat template", "prompt ids"],
        ),
        ((Many(), policy()), (Many(), dataclasses.replace(policy(), eos_ids=(0, 2))), ["tokenizer"]),
        ((Many(), policy()), (Many(other=999), policy()), ["prompts", "prompt ids"]),
        ((Many(), policy()), (Many(count=1001), policy()), ["prompts"]),
        ((Many(count=3), policy()), (Many(count=3, other=1), policy()), ["prompts", "prompt ids"]),
    ],
    ids=["tokenizer", "template", "end tokens", "last prompt", "one more prompt", "few prompts"],
)
def test_tokenizer_template_and_prompts_must_stay(tmp_path, then, now, names):
    workdir = begun(tmp_path, inputs.of_run(CFG, *then))
    assert inputs.check(workdir, inputs.of_run(CFG, *then)) == []
    with pytest.raises(ValueError, match=r"began with something else \(differs in ") as caught:
        inputs.check(workdir, inputs.of_run(CFG, *now))
    assert all(name in str(caught.value) for name in names)


def test_an_exported_tokenizer_is_the_one_that_was_exported(weights):
    """A run that is resumed reads its tokenizer from reference/, whatever it came from."""
    loaded, _ = hf.load(weights)
    first, again = (inputs.of_run(CFG, Many(), dataclasses.replace(one, eos_ids=(2,))) for one in (policy(), loaded))
    assert first == again


def test_the_bytes_of_a_tasks_files_count(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    task = CheckedTask(Many(file=str(file)))
    workdir = begun(tmp_path / "run", inputs.of_run(CFG, task, policy()))
    assert inputs.check(workdir, inputs.of_run(CFG, task, policy())) == []
    file.write_text('{"prompt": "a"} \n')
    with pytest.raises(ValueError, match=rf"task file/{file}"):
        inputs.check(workdir, inputs.of_run(CFG, task, policy()))
    file.unlink()
    with pytest.raises(ValueError, match=r"files\(\): returned .*: return paths of files that are there"):
        inputs.of_run(CFG, task, policy())


def test_code_and_versions_may_change_and_that_is_noted_once(tmp_path, monkeypatch):
    module = tmp_path / "my_rewards.py"
    source = "from tests_many import Many\nclass Mine(Many): pass\n"
    monkeypatch.setitem(sys.modules, "tests_many", sys.modules[__name__])
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text(source)
    import my_rewards  # pyright: ignore[reportMissingImports]

    task = CheckedTask(my_rewards.Mine())
    workdir = begun(tmp_path / "run", inputs.of_run(CFG, task, policy()))
    module.write_text(source + "# another reward\n")
    monkeypatch.setattr("mara_jax.__version__", "9.9")
    now = inputs.of_run(CFG, task, policy())
    notes = inputs.check(workdir, now)
    assert notes[0] == "the code of my_rewards has changed since the run began: it goes on with the new one"
    assert len(notes) == 2 and "has become 9.9" in notes[1]
    inputs.record(workdir, "nano", now)
    assert inputs.check(workdir, now) == []
    (change,) = json.loads((workdir / "inputs.json").read_text())["changes"]
    assert set(change["until then"]) == {"reward code/my_rewards", "version/mara_jax"}
    del sys.modules["my_rewards"]


def test_a_run_without_a_record_is_told_so_and_gets_one(tmp_path):
    workdir = begun(tmp_path, {"tokenizer": "a"})
    (workdir / "inputs.json").unlink()
    (note,) = inputs.check(workdir, {"tokenizer": "b"})
    assert "was not recorded" in note
    inputs.record(workdir, "nano", {"tokenizer": "b"})
    with pytest.raises(ValueError, match="differs in tokenizer"):
        inputs.check(workdir, {"tokenizer": "a"})


def test_a_run_that_has_no_result_yet_may_begin_with_something_else(tmp_path):
    workdir = begun(tmp_path, {"tokenizer": "a"})
    (workdir / "reference.json").unlink()
    assert inputs.check(workdir, {"tokenizer": "b"}) == []
    inputs.record(workdir, "other", {"tokenizer": "b"})
    record = json.loads((workdir / "inputs.json").read_text())
    assert record == {"weights": "other", "inputs": {"tokenizer": "b"}, "changes": []}


@pytest.mark.parametrize("text", ["", "[]", '{"inputs": {}}', '{"weights": "a", "inputs": [], "changes": []}'])
def test_a_damaged_record_is_one_line_with_the_cure(tmp_path, text):
    workdir = begun(tmp_path, {"tokenizer": "a"})
    (workdir / "inputs.json").write_text(text)
    with pytest.raises(ValueError, match=r"inputs.json is no record of a run's inputs: delete it"):
        inputs.check(workdir, {"tokenizer": "a"})


def test_files_of_the_saved_reference_count_and_the_base_no_longer_does(tmp_path, weights):
    """After a warm-up a run reads its base from reference/."""
    workdir = begun(tmp_path / "run", inputs.of_files(CFG, str(weights), inputs.WEIGHTS))
    shutil.copytree(weights, workdir / "reference")
    inputs.record(workdir, "nano", inputs.of_files(CFG, str(workdir / "reference"), inputs.REFERENCE))
    shutil.rmtree(weights)
    now = inputs.of_files(CFG, str(workdir / "reference"), inputs.REFERENCE)
    assert inputs.check(workdir, now) == [] and "reference/model.safetensors" in now
    (workdir / "reference" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"differs in reference/model.safetensors"):
        inputs.check(workdir, inputs.of_files(CFG, str(workdir / "reference"), inputs.REFERENCE))


@pytest.mark.parametrize(("other", "refused"), [("alike", None), ("another", 2)])
def test_processes_that_read_other_files_are_refused(tmp_path, monkeypatch, other, refused):
    """Three processes, of which the third may have another file under the same name."""
    file = tmp_path / "own.txt"
    file.write_text("alike")
    monkeypatch.setattr(inputs.hosts, "several_processes", lambda: True)

    def gathered(own: inputs.Inputs) -> list[inputs.Inputs]:
        file.write_text(other)
        return [own, own, inputs.of_task(CFG, Many(file=str(file)))]

    monkeypatch.setattr(inputs.hosts, "gather_json", gathered)
    monkeypatch.setattr(inputs.hosts, "raise_as_one", lambda error: (_ for _ in ()).throw(error))
    if refused is None:
        inputs.refuse_other_files(CFG, Many(file=str(file)))
        return
    with pytest.raises(ValueError, match=rf"process {refused} reads another task file/.*own.txt than process 0"):
        inputs.refuse_other_files(CFG, Many(file=str(file)))
