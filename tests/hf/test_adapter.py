"""Adapters against peft: the same logits and gradients, and each loads what the other wrote."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import torch_models
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from mara_jax import hf
from mara_jax.config.schema import LORA_TARGETS
from mara_jax.policies import lora, parameters, transformer
from mara_jax.policies.parameters import Lora

LENGTHS = np.array([12, 5])
TOKENS = np.where(np.arange(12) < LENGTHS[:, None], np.random.default_rng(0).integers(3, 97, (2, 12)), 0)
REAL = np.arange(12) < LENGTHS[:, None]
WEIGHT = np.where(REAL[..., None], np.random.default_rng(1).normal(size=(2, 12, 97)), 0).astype(np.float32)
CASES = {
    "all": ("qwen2-tied", False, Lora(4, 12.0, LORA_TARGETS)),
    "olmo2": ("olmo2-untied", False, Lora(3, 4.0, ("q", "k", "down"))),
    "two": ("llama-llama3", True, Lora(3, 1.5, ("v", "down"))),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "all"]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(directory of a torch model, our policy with a lora, our base, an adapter whose b is not zero)."""
    name, scan, settings = CASES[request.param]
    directory = tmp_path_factory.mktemp("model")
    torch_models.save(name, directory)
    policy, base = hf.load(directory, tokenizer=False, scan_layers=scan)
    policy = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, lora=settings))
    rng, adapter = np.random.default_rng(2), {}
    for path, (shape, _) in lora.leaf_shapes(policy.architecture).items():
        parameters.put(adapter, path, jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32))
    return directory, policy, base, adapter


def torch_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def our_logits(policy, base, adapter):
    return np.asarray(policy.logits(lora.attached(policy.architecture, base, adapter), TOKENS, LENGTHS))[REAL]


@pytest.mark.parametrize("case", ["all", *SLOW], indirect=True)
def test_peft_and_transformers_load_the_exports_and_give_our_logits(case, tmp_path):
    directory, policy, base, adapter = case
    ours = our_logits(policy, base, adapter)
    hf.export_adapter(policy, adapter, tmp_path / "adapter")
    hf.export(policy, lora.attached(policy.architecture, base, adapter), tmp_path / "merged")
    with_peft = peft.PeftModel.from_pretrained(torch_model(directory), tmp_path / "adapter").eval()
    of_base = torch_models.logits(torch_model(directory), TOKENS, LENGTHS)[REAL]
    assert np.abs(ours - of_base).max() > 0.3  # the adapter does something
    np.testing.assert_allclose(ours, torch_models.logits(with_peft, TOKENS, LENGTHS)[REAL], rtol=0, atol=5e-5)
    merged = torch_models.logits(torch_model(tmp_path / "merged"), TOKENS, LENGTHS)[REAL]
    np.testing.assert_allclose(ours, merged, rtol=0, atol=5e-5)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("case", ["all", *SLOW], indirect=True)
def test_gradients_are_those_of_peft(case, tmp_path):
    """In float64, but for the rotary angles that both sides make in float32."""
    directory, policy, base, adapter = case
    hf.export_adapter(policy, adapter, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(torch_model(directory), tmp_path / "adapter", is_trainable=True).double()
    out = theirs(torch.tensor(TOKENS), attention_mask=torch.tensor(REAL).long()).logits
    (torch.tensor(WEIGHT) * torch.sin(out)).sum().backward()
    expected = {k.replace(".default", ""): p.grad.numpy() for k, p in theirs.named_parameters() if p.requires_grad}
    with jax.enable_x64(True):
        arch = dataclasses.replace(policy.architecture, compute_dtype="float64")
        base, adapter = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree) for tree in (base, adapter))
        tokens = TOKENS.astype(np.int32)
        at = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)

        @jax.jit
        @jax.grad
        def gradient(adapter):
            hidden, _ = transformer.forward(arch, lora.attached(arch, base, adapter), tokens, at)
            return jnp.sum(WEIGHT * jnp.sin(transformer.logits(arch, base, hidden)))

        ours, rows = gradient(adapter), lora.rows(arch)
        assert {row.name for row in rows} == expected.keys()
        for row in rows:
            largest = np.abs(expected[row.name]).max()
            assert largest > 0.1
            np.testing.assert_allclose(parameters.read(ours, row).T, expected[row.name], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("case", ["two"], indirect=True)
def test_an_adapter_that_peft_wrote_loads_and_goes_back_bit_for_bit(case, tmp_path):
    directory, policy, base, _ = case
    settings = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=r".*\.(q_proj|up_proj)")
    theirs = peft.get_peft_model(torch_model(directory), settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    plain = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, lora=None))
    loaded, adapter = hf.load_adapter(plain, tmp_path / "theirs")
    assert loaded.architecture.lora == Lora(4, 3 * 4**0.5, ("q", "up"))
    expected = torch_models.logits(theirs, TOKENS, LENGTHS)[REAL]
    np.testing.assert_allclose(our_logits(loaded, base, adapter), expected, rtol=0, atol=5e-5)
    hf.export_adapter(loaded, adapter, tmp_path / "ours")
    ours, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(ours[name], array)


@pytest.mark.parametrize("case", ["two"], indirect=True)
@pytest.mark.parametrize(
    ("start", "rank_stabilised"),
    [(True, False), (False, True), ("gaussian", False), ("orthogonal", True), ("eva", False), ("mica", True)],
)
def test_starts_that_leave_the_base_alone_give_pefts_logits(case, start, rank_stabilised, tmp_path):
    """The trained model, what peft reads again and what we read are one model."""
    directory, policy, base, _ = case
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=rank_stabilised, init_lora_weights=start, target_modules=["v_proj", "down_proj"],
        eva_config=peft.EvaConfig() if start == "eva" else None, task_type="CAUSAL_LM",
    )  # fmt: skip
    trained = peft.get_peft_model(torch_model(directory), settings).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    plain = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, lora=None))
    loaded, adapter = hf.load_adapter(plain, tmp_path / "adapter")
    ours = our_logits(loaded, base, adapter)
    np.testing.assert_allclose(ours, torch_models.logits(trained, TOKENS, LENGTHS)[REAL], rtol=0, atol=5e-5)
    again = peft.PeftModel.from_pretrained(torch_model(directory), tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours, torch_models.logits(again, TOKENS, LENGTHS)[REAL], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", ["two"], indirect=True)
def test_a_converted_pissa_adapter_is_plain_lora(case, tmp_path):
    """peft's cure, which the refusal names: twice the rank, and the base as it was."""
    directory, policy, base, _ = case
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["v_proj", "down_proj"])
    trained = peft.get_peft_model(torch_model(directory), settings).eval()
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "start")
    trained.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "as it is")
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, lora=None))
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        hf.load_adapter(plain, tmp_path / "as it is")
    loaded, adapter = hf.load_adapter(plain, tmp_path / "converted")
    assert loaded.architecture.lora.rank == 4
    expected = torch_models.logits(trained, TOKENS, LENGTHS)[REAL]
    np.testing.assert_allclose(our_logits(loaded, base, adapter), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["two"], indirect=True)
def test_an_adapter_that_is_not_finite_or_quantised_is_refused(case, tmp_path):
    _, policy, _, adapter = case
    out = hf.export_adapter(policy, adapter, tmp_path / "adapter")
    weights, name = out / "adapter_model.safetensors", "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"
    tensors = load_file(weights)
    save_file(tensors | {name: np.full_like(tensors[name], np.inf)}, weights)
    with pytest.raises(ValueError, match=rf"holds {name} with NaN or infinity in 48 of 48 places"):
        hf.load_adapter(policy, out)
    save_file(tensors | {name: tensors[name].astype(np.int8)}, weights)
    with pytest.raises(ValueError, match=rf"holds {name} in int8, so it is quantised"):
        hf.load_adapter(policy, out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora=True in adapter_config.json asks for DoRA"),
        ({"bias": "all"}, "bias='all' in adapter_config.json asks for trained biases"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' .* changes the base weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
        ({"init_lora_weights": 1}, "init_lora_weights=1"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* trained whole"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"use_sparse_lora": True}, "use_sparse_lora=True in adapter_config.json is a setting that this code does not"),
        ({"use_rslora": "yes"}, "use_rslora='yes' must be true or false"),
        ({"r": "four"}, "r='four'"),
        ({"r": True}, "r=True"),
        ({"r": 2}, r"of shape \[3, 32\], expected \[2, 32\]"),
        (
            "lack",
            "lacks base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight: it must adapt the same kernels",
        ),
        ("more", "holds the unexpected base_model.model.lm_head.lora_A.weight"),
        ("cut", "not a whole safetensors file"),
        ("gone", "has no adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("case", ["two"], indirect=True)
def test_another_adapter_is_refused_in_one_line(case, change, words, tmp_path):
    _, policy, _, adapter = case
    out = hf.export_adapter(policy, adapter, tmp_path / "adapter")
    weights = out / "adapter_model.safetensors"
    if isinstance(change, dict):
        file = out / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    elif change == "gone":
        weights.unlink()
    elif change == "cut":
        weights.write_bytes(weights.read_bytes()[:300])
    else:
        tensors = load_file(weights)
        if change == "lack":
            del tensors["base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"]
        else:
            tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 32), np.float32)
        save_file(tensors, weights)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        hf.load_adapter(policy, out)
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)


@pytest.mark.parametrize("case", ["two"], indirect=True)
def test_an_export_never_overwrites_or_writes_another_tree(case, tmp_path):
    directory, policy, base, adapter = case
    with pytest.raises(FileExistsError, match="exists already"):
        hf.export_adapter(policy, adapter, directory)
    with pytest.raises(ValueError, match=r"the parameters (lack|have the unexpected)"):
        hf.export_adapter(policy, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
