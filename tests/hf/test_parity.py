import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from transformers import AutoModelForCausalLM

from mara_jax import hf
from mara_jax.policies import transformer
from mara_jax.policies.ops import rotary
from mara_jax.policies.ops.attention import Mask, causal_mask

LENGTHS = np.array([40, 13, 5])
TOKENS = np.where(np.arange(40) < LENGTHS[:, None], np.random.default_rng(0).integers(3, 97, (3, 40)), 0)
REAL = np.arange(40) < LENGTHS[:, None]
SCANNED = ("qwen3-own-head-dim", "olmo2-tied")


@pytest.fixture(scope="module", params=torch_models.CONFIGS)
def pair(request, tmp_path_factory):
    """(torch model, our policy, our params) of one family; both orders of layers take turns."""
    directory = tmp_path_factory.mktemp("model")
    model = torch_models.save(request.param, directory)
    return (model, *hf.load(directory, tokenizer=False, scan_layers=request.param in SCANNED))


def test_logits_of_right_padded_batches_match_torch(pair):
    model, policy, params = pair
    expected = torch_models.logits(model, TOKENS, LENGTHS)
    got = policy.logits(params, TOKENS, LENGTHS)
    assert np.abs(expected[REAL]).max() > 1
    np.testing.assert_allclose(got[REAL], expected[REAL], atol=1e-4)
    assert np.isfinite(got).all()


def test_every_layer_matches_torch(pair):
    model, policy, params = pair
    arch = dataclasses.replace(policy.architecture, scan_layers=False)
    if policy.architecture.scan_layers:
        from mara_jax.policies.parameters import to_unrolled

        params = to_unrolled(params, arch.layers)
    tokens, at = jnp.asarray(TOKENS), jnp.broadcast_to(jnp.arange(40), TOKENS.shape)
    with torch.no_grad():
        reference = model(torch.tensor(TOKENS), attention_mask=torch.tensor(REAL).long(), output_hidden_states=True)
    group = arch.heads // arch.kv_heads
    segment = transformer.Segment(rotary.angles(arch, at), Mask(causal_mask(40, group)))

    @jax.jit
    def run(params):
        x_btd, outputs = transformer.Embedding(arch).apply({"params": params["embed"]}, tokens), []
        for index in range(arch.layers):
            layer = {"params": params[f"layers_{index}"]}
            (x_btd,), _ = transformer.Block(arch).apply(layer, (x_btd,), (segment,), None, None)
            outputs.append(x_btd)
        return outputs, transformer.forward(arch, params, tokens, at)[0]

    layers, hidden = run(params)
    # torch lists the embedding, the output of every layer but the last, and the normed output of the last.
    for ours, theirs in zip([*layers[:-1], hidden], reference.hidden_states[1:], strict=True):
        np.testing.assert_allclose(np.asarray(ours)[REAL], theirs.numpy()[REAL], atol=1e-4)


def test_greedy_decoding_is_token_identical_to_generate(pair):
    model, policy, params = pair
    arch, new = policy.architecture, 12
    lengths_p = jnp.array([9, 4, 1])
    prompts = TOKENS[:, :9] * (np.arange(9) < np.asarray(lengths_p)[:, None])

    @jax.jit
    def decode(params):
        at = jnp.broadcast_to(jnp.arange(9), prompts.shape)
        hidden, prefix = transformer.forward(arch, params, jnp.asarray(prompts), at)
        last = transformer.logits(arch, params, hidden[jnp.arange(3), lengths_p - 1])

        def step(carry, index):
            token_p, cache = carry
            hidden, cache = transformer.forward(
                arch,
                params,
                token_p[:, None],
                (lengths_p + index)[:, None],
                prefix=prefix,
                prefix_lengths_p=lengths_p,
                cache=cache,
                index=index,
            )
            return (transformer.logits(arch, params, hidden[:, 0]).argmax(-1), cache), token_p

        carry = last.argmax(-1), transformer.init_cache(arch, 3, new)
        return jax.lax.scan(step, carry, jnp.arange(new))[1].T

    ours = np.asarray(decode(params))
    model.generation_config.eos_token_id = None  # compare all tokens, an end token among them or not
    for row, length in enumerate(np.asarray(lengths_p)):
        prompt = torch.tensor(prompts[row : row + 1, :length])
        theirs = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
        )
        np.testing.assert_array_equal(ours[row], theirs[0, length:].numpy())


def test_transformers_loads_the_export_and_gives_the_same_logits(pair, tmp_path):
    model, policy, params = pair
    hf.export(policy, params, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(back) is type(model) and back.dtype == torch.float32
    expected = torch_models.logits(model, TOKENS, LENGTHS)
    np.testing.assert_array_equal(torch_models.logits(back, TOKENS, LENGTHS), expected)
    assert back.generation_config.eos_token_id in (1, [1])


def test_a_model_without_a_config_of_its_own_exports_too(pair, tmp_path):
    model, policy, params = pair
    hf.export(dataclasses.replace(policy, config={}, eos_ids=(3, 7), pad_id=4), params, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    # The class of a family has token ids of its own, for another vocabulary, where the file says nothing.
    assert (back.config.bos_token_id, back.config.eos_token_id, back.config.pad_token_id) == (None, [3, 7], 4)
    expected = torch_models.logits(model, TOKENS, LENGTHS)
    np.testing.assert_array_equal(torch_models.logits(back, TOKENS, LENGTHS), expected)
