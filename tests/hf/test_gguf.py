import dataclasses

import chex
import gguf
import numpy as np
import pytest
import torch
import torch_models
import transformers

from mara_jax import hf
from mara_jax.hf.gguf import unpermute

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weight, heads):
    """llama.cpp's order of a head's rows, one by one: row 2i is channel i, row 2i + 1 channel i + h/2."""
    size = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + i + size // 2]
    return out


def write_gguf(file, model, family, *, more=lambda writer: None, scaling_type=True):
    """What llama.cpp's converter would write for a torch model, in float32; `more` adds metadata."""
    config = model.config
    writer = gguf.GGUFWriter(file, family)
    more(writer)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        if scaling_type:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(5)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if family == "llama" and "q_proj" in name:
            array = permute(array, config.num_attention_heads)
        if family == "llama" and "k_proj" in name:
            array = permute(array, config.num_key_value_heads)
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{NAMES[rest]}.{kind}", array)
        else:
            writer.add_tensor(f"{NAMES[stem]}.{kind}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama-linear", "qwen2-untied", "qwen3-own-head-dim"])
def test_gguf_and_safetensors_of_one_model_are_the_same_model(tmp_path, name):
    model = torch_models.save(name, tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", model, name.split("-")[0])
    expected_policy, expected = hf.load(tmp_path / "hf", tokenizer=False)
    policy, params = hf.load(tmp_path / "model.gguf", tokenizer=False)
    chex.assert_trees_all_equal(params, expected)
    assert policy.eos_ids == (1, 5)
    ours, theirs = policy.architecture, expected_policy.architecture
    assert ours.norm_eps == np.float32(theirs.norm_eps)
    assert dataclasses.replace(ours, norm_eps=theirs.norm_eps) == theirs


def test_unpermute_undoes_the_converter():
    weight = np.arange(24 * 3).reshape(24, 3)
    np.testing.assert_array_equal(unpermute(permute(weight, 3), 3), weight)
    assert not np.array_equal(permute(weight, 3), weight)


def refused(where, *parts, kind=ValueError):
    with pytest.raises(kind) as caught:
        hf.load(where, tokenizer=False)
    text = str(caught.value)
    assert "\n" not in text and str(where) in text
    for part in parts:
        assert part in text, text


def test_gguf_errors_are_one_line(tmp_path):
    file = tmp_path / "model.gguf"
    refused(file, "does not exist", kind=FileNotFoundError)
    file.write_bytes(b"not a model")
    refused(file, "is not a GGUF file", "download it again")
    model = torch_models.make("llama-linear")
    write_gguf(file, model, "llama")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000])
    refused(file, "not a whole GGUF file")
    write_gguf(file, model, "gemma")
    refused(file, "unknown architecture 'gemma': this code knows llama, qwen2, qwen3")


def test_a_scaling_factor_without_a_type_is_linear_as_it_is_to_llama_cpp(tmp_path):
    model = torch_models.make("llama-linear")
    for number, options in enumerate(({}, {"scaling_type": False})):
        write_gguf(tmp_path / f"{number}.gguf", model, "llama", **options)
        arch = hf.load(tmp_path / f"{number}.gguf", tokenizer=False)[0].architecture
        assert (arch.rope_scaling.kind, arch.rope_scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (lambda w: (w.add_uint16("split.no", 1), w.add_uint16("split.count", 3)),
         ("is one of 3 files", "the 2. part", "llama-gguf-split --merge")),
        (lambda w: w.add_type("adapter"), ("is of the type 'adapter'",)),
        (lambda w: w.add_uint32("llama.expert_count", 8), ("expert_count=8 in the GGUF metadata", "experts")),
        (lambda w: w.add_float32("llama.residual_scale", 0.5), ("residual_scale=0.5", "does not know")),
        (lambda w: w.add_float32("llama.rope.scaling.attn_factor", 1.5), ("rope.scaling.attn_factor=1.5",)),
        (lambda w: w.add_bool("llama.attention.causal", False), ("attention.causal=False", "later tokens")),
        (lambda w: w.add_uint32("llama.attention.sliding_window", 64), ("sliding_window=64 is below",)),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 4), ("rope.dimension_count=4", "heads of 8 channels")),
        (lambda w: w.add_uint32("llama.attention.value_length", 16), ("attention.value_length=16",)),
    ],
)  # fmt: skip
def test_metadata_that_changes_the_model_is_refused(tmp_path, more, parts):
    file = tmp_path / "model.gguf"
    write_gguf(file, torch_models.make("llama-linear"), "llama", more=more)
    refused(file, *parts)


def test_metadata_without_effect_is_let_pass(tmp_path):
    file, model = tmp_path / "model.gguf", torch_models.make("llama-linear")

    def more(writer):
        writer.add_vocab_size(97)
        writer.add_rope_dimension_count(8)
        writer.add_value_length(8)
        writer.add_type("model")
        writer.add_uint32("llama.expert_count", 0)
        writer.add_uint32("llama.attention.sliding_window", 512)
        writer.add_string("mradermacher.quantize_version", "2")

    write_gguf(file, model, "llama", more=more)
    write_gguf(tmp_path / "plain.gguf", model, "llama")
    (policy, params), (_, plain) = (hf.load(path, tokenizer=False) for path in (file, tmp_path / "plain.gguf"))
    chex.assert_trees_all_equal(params, plain)
    assert policy.architecture.max_positions == 512


def test_numbers_that_are_not_finite_and_types_that_nobody_reads_are_refused(tmp_path):
    file, model = tmp_path / "model.gguf", torch_models.make("llama-linear")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    write_gguf(file, model, "llama")
    refused(file, "holds model.layers.1.mlp.up_proj.weight with NaN or infinity in 1 of 1536 places")
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 8), (writer.add_embedding_length, 8),
        (writer.add_feed_forward_length, 8), (writer.add_head_count, 1), (writer.add_layer_norm_rms_eps, 1e-6),
    ):  # fmt: skip
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((5, 8), np.int32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(8, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(file, "holds token_embd.weight in I32", "does not read: take a file in F16")
    damaged = bytearray(file.read_bytes())
    damaged[4] = 9
    file.write_bytes(bytes(damaged))
    refused(file, "newer or older kind than the package gguf", "update that package")


@pytest.fixture(scope="module")
def smollm2():
    return hf.load("smollm2-135m-instruct", tokenizer=False)


PROMPT = [504, 3575, 282, 4649, 314]  # "The capital of France is"


def test_smollm2_knows_the_capital_of_france(smollm2):
    policy, params = smollm2
    arch = policy.architecture
    assert (arch.layers, arch.embed, arch.vocab_size, arch.tie_embeddings) == (30, 576, 49152, True)
    assert policy.eos_ids == (2,)
    top = int(policy.logits(params, [PROMPT], [5])[0, -1].argmax())
    assert top == 7042  # " Paris"


def torch_smollm2(file):
    """transformers' Llama filled from the file by this test's own names and row order."""
    reader = gguf.GGUFReader(file)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ours = {ggml: name for name, ggml in NAMES.items()}
    state = {}
    for tensor in reader.tensors:
        array = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        parts = tensor.name.split(".")
        heads = {"attn_q": 9, "attn_k": 3}.get(parts[-2])
        if heads:
            order = permute(np.arange(len(array)), heads)  # row i of the file is row order[i] of the model
            unpermuted = np.empty_like(array)
            unpermuted[order] = array
            array = unpermuted
        layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        state[f"{layer}{ours[parts[-2]]}.weight"] = torch.from_numpy(array)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.slow
def test_smollm2_matches_torch_reading_the_same_file(smollm2):
    policy, params = smollm2
    model = torch_smollm2(policy.source)
    prompt = torch.tensor([PROMPT])
    model.generation_config.eos_token_id = None
    theirs = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    expected = torch_models.logits(model, [theirs], [len(theirs)])
    got = np.asarray(policy.logits(params, [theirs], [len(theirs)]))
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(got, expected, atol=1e-3)  # 30 layers of float32 sums in two orders
    assert got[0, 4:-1].argmax(-1).tolist() == theirs[5:]
