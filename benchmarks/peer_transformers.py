"""The peer's side of rollout_vs_transformers.py: transformers' `generate` on an exported model."""

import json
import sys

import numpy as np
import side_by_side as sides
import torch
import transformers

case = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_pretrained(case["weights"], dtype=torch.float32).eval()
prompts = torch.tensor(np.repeat(np.array(case["prompts"]), case["group"], axis=0))
settings = transformers.GenerationConfig(
    do_sample=True,
    top_k=0,
    max_new_tokens=case["new"],
    pad_token_id=0,
    eos_token_id=case["ends"] or None,
)


def work(turn: int) -> dict:
    start = sides.clock()
    with torch.inference_mode():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)
    seconds = sides.clock() - start
    new = out[:, prompts.shape[1] :]
    ended = torch.isin(new, torch.tensor(case["ends"], dtype=new.dtype))
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, case["new"])
    return {"cpu_s": seconds, "tokens": int(lengths.sum())}


sides.serve({"torch": torch.__version__, "transformers": transformers.__version__}, work)
