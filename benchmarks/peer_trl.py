"""The peer's side of step_vs_trl.py: TRL's GRPOTrainer on an exported model. Run by that script."""

import json
import sys
import tempfile

import datasets
import side_by_side as sides
import tokenizers
import torch
import transformers
import trl

case = json.loads(sys.argv[1])
torch.set_num_threads(1)
out = sides.protocol()
spent = {"generate_s": 0.0, "reference_s": 0.0, "tokens": 0}


class Trainer(trl.GRPOTrainer):
    """GRPO with a clock around its phases."""

    def _generate(self, prompts):
        start = sides.clock()
        result = super()._generate(prompts)
        spent["generate_s"] += sides.clock() - start
        return result

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        start = sides.clock()
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if model is self.ref_model:
            spent["reference_s"] += sides.clock() - start
        return result


class Turns(transformers.TrainerCallback):
    """Every optimiser step waits for a line and reports itself; the end of the input stops training."""

    def __init__(self):
        self.turn, self.start = 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if not sys.stdin.readline():
            print(json.dumps(sides.peaks()), file=out, flush=True)
            sys.exit(0)  # nothing is saved: there is no other way out of a step that has begun
        spent.update(generate_s=0.0, reference_s=0.0, tokens=0)
        self.start = sides.clock()

    def on_step_end(self, args, state, control, **kwargs):
        total = sides.clock() - self.start
        update = total - spent["generate_s"] - spent["reference_s"]
        print(json.dumps({"cpu_s": total, "update_s": update, **spent}), file=out, flush=True)
        if self.turn == 0:
            sides.forget_peak()
        self.turn += 1


def reward(completion_ids, **_):
    """Random, so that groups have an advantage; also counts tokens."""
    spent["tokens"] += sum(len(ids) for ids in completion_ids)
    return torch.randint(0, 2, (len(completion_ids),)).float().tolist()


def word_tokenizer(words: int):
    """A word for every id, so that prompts can be given as ids. Its end token lies outside the model's vocabulary."""
    table = {f"w{i}": i for i in range(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(table | {"end": words}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="end")


rows = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in case["prompts"]]
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=case["weights"],
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,  # on by default: a third more work, in less memory
            beta=0.1,
            learning_rate=1e-5,
            per_device_train_batch_size=case["samples"],
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            num_generations=case["group"],
            max_completion_length=case["new"],
            max_steps=100_000,
            shuffle_dataset=False,
            report_to="none",
            logging_steps=1_000_000,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows * 1000),
        processing_class=word_tokenizer(case["words"]),
        callbacks=[Turns()],
    )
    if not case["ends"]:
        trainer.eos_token_ids = []
        trainer.generation_config.eos_token_id = None
    ready = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    print(json.dumps(ready), file=out, flush=True)
    trainer.train()
