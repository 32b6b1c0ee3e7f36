"""Small random models of each family, made by torch transformers: the reference that ours must match."""

import torch
import transformers

_SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
# 64 original positions put this model's four wavelengths in all three bands of llama3's scaling.
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CONFIGS = {
    "qwen2-tied": lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2-untied": lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3-own-head-dim": lambda: transformers.Qwen3Config(**_SIZES, head_dim=12, tie_word_embeddings=True),
    "llama-llama3": lambda: transformers.LlamaConfig(**_SIZES, rope_parameters=_LLAMA3, tie_word_embeddings=False),
    "llama-linear": lambda: transformers.LlamaConfig(
        **_SIZES,
        rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=2.0),
        tie_word_embeddings=True,
    ),
    "mistral-own-head-dim": lambda: transformers.MistralConfig(
        **_SIZES, head_dim=12, sliding_window=None, tie_word_embeddings=False
    ),
    "mistral-tied": lambda: transformers.MistralConfig(**_SIZES, sliding_window=512, tie_word_embeddings=True),
    "olmo2-untied": lambda: transformers.Olmo2Config(**_SIZES, tie_word_embeddings=False),
    "olmo2-tied": lambda: transformers.Olmo2Config(**_SIZES, tie_word_embeddings=True),
}


def make(name, seed=0):
    """A float32 model whose norm scales and biases are random too, so that none can be dropped unnoticed."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def save(name, directory, *, dtype=None, max_shard_size="5GB", seed=0):
    """Save such a model with transformers' own writer and return it."""
    model = make(name, seed)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def logits(model, tokens, lengths):
    """Torch's logits of right-padded sequences, as numpy."""
    tokens = torch.tensor(tokens)
    mask = (torch.arange(tokens.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits.float().numpy()
