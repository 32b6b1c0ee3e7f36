"""Reads exported directories with whichever transformers is first on the path: python reader_program.py OUT DIR ...

Writes OUT.json (version, and of each directory the ids of texts and a chat as text) and OUT.npz (its logits).
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

TEXTS = ["Two primes: 7, 11.\n", " a  ab é", "<|im_start|>12</s>"]
CHAT = [
    {"role": "user", "content": "Hi, 12?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": " b"},
]


def read(directory: str) -> tuple[dict, np.ndarray]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    said = {
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "ends": model.generation_config.eos_token_id,
        "ids": ids,
        "texts": [tokenizer.decode(row) for row in ids],
        "size": len(tokenizer),
        "special": sorted(tokenizer.all_special_tokens),
        "inputs": sorted(tokenizer("a")),
    }
    if tokenizer.chat_template is not None:
        said["chat"] = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        return said, model(torch.tensor([ids[0]])).logits[0].numpy()


if __name__ == "__main__":
    out, *directories = sys.argv[1:]
    results = {directory: read(directory) for directory in directories}
    said = {directory: said for directory, (said, _) in results.items()}
    with open(out + ".json", "w") as stream:
        json.dump({"version": transformers.__version__, "said": said}, stream)
    np.savez(out + ".npz", *(logits for _, logits in results.values()))
