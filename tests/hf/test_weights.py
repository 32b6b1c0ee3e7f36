import json
import shutil

import chex
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_models
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mara_jax import hf
from mara_jax.hf.tensors import _is_finite
from mara_jax.policies.policy import Policy

DTYPES_ON_DISK = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tensors_in(directory):
    """Every tensor in a directory's safetensors files, as (dtype name, raw bytes, shape)."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                array = opened.get_tensor(name)
                found[name] = (str(array.dtype), array.tobytes(), array.shape)
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bit_exact(tmp_path, dtype, sharded):
    limit = 20_000 if sharded else 10**9
    torch_models.save("qwen2-untied", tmp_path / "in", dtype=DTYPES[dtype], max_shard_size=limit)
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == sharded
    expected = tensors_in(tmp_path / "in")
    assert {kind for kind, _, _ in expected.values()} == {dtype}
    for scan in (False, True):
        policy, params = hf.load(tmp_path / "in", tokenizer=False, param_dtype=dtype, scan_layers=scan)
        out = hf.export(policy, params, tmp_path / f"out-{scan}", max_shard_bytes=limit)
        assert (out / "model.safetensors.index.json").exists() == sharded
        assert tensors_in(out) == expected
        again, same = hf.load(out, tokenizer=False, param_dtype=dtype, scan_layers=scan)
        chex.assert_trees_all_equal(same, params)
        assert again.architecture == policy.architecture
        # Through float32 and back loses nothing either.
        policy, wide = hf.load(tmp_path / "in", tokenizer=False)
        out = hf.export(policy, wide, tmp_path / f"wide-{scan}", dtype=dtype)
        assert tensors_in(out) == expected


def test_export_leaves_nothing_behind_when_it_fails(tmp_path):
    policy, params = load_tied(tmp_path)

    class Broken:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, directory):
            raise OSError("disk full")

    broken = Policy(policy.architecture, Broken(), policy.eos_ids, policy.pad_id, policy.config, "test")
    with pytest.raises(OSError, match="disk full"):
        hf.export(broken, params, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def load_tied(tmp_path):
    torch_models.save("qwen2-tied", tmp_path / "in")
    return hf.load(tmp_path / "in", tokenizer=False)


def test_export_refuses_an_occupied_place_and_foreign_parameters(tmp_path):
    policy, params = load_tied(tmp_path)
    with pytest.raises(FileExistsError, match="exists already"):
        hf.export(policy, params, tmp_path / "in")
    with pytest.raises(ValueError, match="lack final_norm/scale"):
        hf.export(policy, {key: tree for key, tree in params.items() if key != "final_norm"}, tmp_path / "out")
    with pytest.raises(ValueError, match="have the unexpected lora/a"):
        hf.export(policy, {**params, "lora": {"a": params["final_norm"]["scale"]}}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"final_norm/scale has shape \[31\], expected \[32\]"):
        wrong = {**params, "final_norm": {"scale": params["final_norm"]["scale"][1:]}}
        hf.export(policy, wrong, tmp_path / "out")
    with pytest.raises(ValueError, match="would be written in int8"):
        hf.export(policy, params, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    torch_models.save("qwen2-tied", directory / "single")
    torch_models.save("qwen2-tied", directory / "sharded", max_shard_size=20_000)
    return directory


@pytest.fixture
def single(good, tmp_path):
    return shutil.copytree(good / "single", tmp_path / "model")


@pytest.fixture
def sharded(good, tmp_path):
    return shutil.copytree(good / "sharded", tmp_path / "model")


def change_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(directory, name="config.json", **changes):
    file = directory / name
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(where, *parts, kind=ValueError, **options):
    """Load fails with an error of one line that names each part."""
    options = {"tokenizer": False, **options}
    with pytest.raises(kind) as caught:
        hf.load(where, **options)
    text = str(caught.value)
    assert "\n" not in text and str(where) in text
    for part in parts:
        assert part in text, text


def test_missing_tensor(single):
    change_tensors(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(single, "lacks model.layers.1.mlp.up_proj.weight", "one of 1 missing", "config.json")


def test_unexpected_tensor(single):
    change_tensors(single, lambda tensors: tensors.update(extra=np.zeros(3, np.float32)))
    refused(single, "holds extra", "one of 1 unexpected", "config.json")


def test_misshapen_tensor(single):
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(single, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    refused(single, f"{name} of shape [48, 32], expected [32, 48]")


@pytest.mark.parametrize(
    ("dtype", "parts"),
    [
        (np.int32, ("in int32", "quantised", "float32, bfloat16 or float16")),
        (np.int8, ("in int8", "quantised")),
        (ml_dtypes.float8_e4m3fn, ("in F8_E4M3", "quantised")),
        (np.float64, ("in float64", "write it again in float32")),
    ],
)
def test_tensor_in_another_dtype(single, dtype, parts):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(single, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    refused(single, name, *parts)


@pytest.mark.parametrize(
    "part", ["qweight", "weight_scale_inv", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "scales", "SCB"]
)
def test_parts_of_quantised_weights(single, part):
    stem = "model.layers.0.mlp.up_proj"
    change_tensors(single, lambda tensors: tensors.update({f"{stem}.{part}": np.ones(3, np.uint8)}))
    refused(single, f"{stem}.{part}, a part of quantised weights", "choose the model's weights in float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_with_the_tensors_name(single, dtype, scan, value):
    name = "model.layers.2.self_attn.o_proj.weight"

    def spoil(tensors):
        tensors[name] = tensors[name].astype(DTYPES_ON_DISK[dtype])
        tensors[name][3, 5] = tensors[name][0, 0] = value

    change_tensors(single, spoil)
    refused(single, f"holds {name} with NaN or infinity in 2 of 1024 places", scan_layers=scan, param_dtype=dtype)


def test_the_largest_numbers_of_a_dtype_are_finite_and_those_beyond_are_named(single):
    name = "model.layers.0.mlp.gate_proj.weight"
    change_tensors(single, lambda tensors: tensors[name].__setitem__((1, 2), -65504.0))
    kernel = hf.load(single, tokenizer=False, param_dtype="float16")[1]["layers_0"]["gate"]["kernel"]
    assert kernel[2, 1] == -65504.0
    change_tensors(single, lambda tensors: tensors[name].__setitem__((1, 2), -1e6))
    refused(single, f"{name} with numbers up to 1e+06, beyond float16: load it in float32", param_dtype="float16")
    assert hf.load(single, tokenizer=False)[1]["layers_0"]["gate"]["kernel"][2, 1] == -1e6


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finiteness_by_bits_is_numpys(dtype):
    numbers = np.array([0.0, -0.0, 1.0, -1.0, np.nan, -np.nan, np.inf, -np.inf, 1e-7, -1e-7], dtype)
    largest = ml_dtypes.finfo(dtype).max
    for chosen in ([], [0], [1], [1, 3], [2, 4], [3, 5], [1, 6], [0, 7], [8, 9], [7], [5]):
        array = np.append(numbers[chosen], [largest, -largest]).astype(dtype)
        assert _is_finite(array) == bool(np.isfinite(array.astype(np.float32)).all()), array
    assert _is_finite(np.array([-1.0, -2.0], dtype)) and _is_finite(np.zeros((0, 3), dtype))


def test_tied_head_may_be_stored_only_if_it_is_the_embedding(single):
    change_tensors(single, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert hf.load(single, tokenizer=False)[0].architecture.tie_embeddings
    change_tensors(single, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    refused(single, "lm_head.weight differs", "tie_word_embeddings")


def test_stored_rotary_frequencies_are_let_pass(single):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    without = hf.load(single, tokenizer=False)[1]
    change_tensors(single, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    chex.assert_trees_all_equal(hf.load(single, tokenizer=False)[1], without)


@pytest.mark.parametrize("keep", [0, 20, -100])
def test_truncated_file(single, keep):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(single, "model.safetensors is not a whole safetensors file", "download it again")


def test_untied_weights_without_a_head(single):
    change_config(single, tie_word_embeddings=False)
    refused(single, "lacks lm_head.weight", "set tie_word_embeddings to true")


def test_embedding_with_other_rows_than_the_vocabulary(single):
    change_config(single, vocab_size=96, eos_token_id=1)
    refused(single, "model.embed_tokens.weight of shape [97, 32], expected [96, 32]")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pointers_of_git_lfs(single, name):
    (single / "pytorch_model.bin").write_bytes(POINTER)  # which nobody reads
    assert hf.load(single, tokenizer=False)
    (single / name).write_bytes(POINTER)
    refused(single, f"{name} is a pointer of git-lfs", "git lfs pull", tokenizer=name == "tokenizer.json")


def test_the_folder_of_a_run(single, tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    refused(tmp_path, "is the folder of a run, not a model", f"give {single}")


def test_a_gguf_that_is_a_pointer(tmp_path):
    (tmp_path / "m.gguf").write_bytes(POINTER)
    refused(tmp_path / "m.gguf", "is a pointer of git-lfs")


def only(directory, *names):
    """Keep these files, and make them where they are not there."""
    for file in directory.iterdir():
        if file.name not in names:
            file.unlink()
    for name in names:
        (directory / name).touch()
    return directory


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ((), "is empty: download the model again"),
        (("config.json", "pytorch_model.bin"), "holds pytorch_model.bin but no .safetensors file"),
        (("config.json", "consolidated.safetensors"), "download model*.safetensors"),
        (("config.json", "adapter_model.safetensors"), "holds adapter_model.safetensors, which is no model"),
        (("config.json", "model-00001-of-00003.safetensors"), "holds 1 of the 3 files of model"),
        (("params.json", "consolidated.safetensors"), "the author's own format"),
        (("a.gguf", "README.md"), "has no config.json but a.gguf: give the name of that file itself"),
    ],
)
def test_directories_that_hold_something_else(single, names, part):
    refused(only(single, *names), part, kind=FileNotFoundError)


def test_a_directory_of_an_adapter(single):
    (single / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    refused(single, "adapter_config.json beside config.json", "lora.adapter")
    (single / "config.json").unlink()
    refused(single, "holds an adapter, not a model", "'owner/base'", "lora.adapter", kind=FileNotFoundError)


def test_shard_that_is_half_there(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(sharded, f"{file.name} is not a whole safetensors file", "download it again")


def test_shard_that_is_not_there(sharded):
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    refused(sharded, missing.name, "is named by the index but is not there", kind=FileNotFoundError)


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, array = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: array}, second)
    refused(sharded, f"{second.name} holds {name} a second time")


@pytest.mark.parametrize(
    ("key", "part"),
    [("num_attention_heads", "None must be a positive number"), ("rope_theta", "None must be a positive")],
)
def test_a_null_where_a_number_must_be(single, key, part):
    file = single / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": None, key: None}))
    refused(single, f"{key}={part}")


def test_an_index_that_names_no_files(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 3}}')
    refused(sharded, "maps model.norm.weight to 3, not to the name of a file")


def test_a_file_that_is_no_gguf(single):
    refused(single / "model.safetensors", "is a file that is no .gguf")


def test_index_without_a_map(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "has no weight_map")


def test_directory_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "does not exist", "smollm2-135m-instruct", kind=FileNotFoundError)


def test_directory_without_a_config(single):
    (single / "config.json").unlink()
    refused(single, "no config.json", kind=FileNotFoundError)


def test_directory_without_weights(single):
    (single / "model.safetensors").unlink()
    refused(single, "no .safetensors file", kind=FileNotFoundError)


def test_directory_without_a_tokenizer(single):
    refused(single, "tokenizer", tokenizer=True)


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"{", "is not JSON"), (b'"\xff"', "is not JSON"), (b"[]", "holds a list, not an object")],
)
def test_broken_config(single, content, part):
    (single / "config.json").write_bytes(content)
    refused(single, part, "fetch the file again")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "mamba"}, "unknown model_type 'mamba': this code knows qwen2, qwen3, llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' in config.json"),
        ({"use_sliding_window": True}, "use_sliding_window=True in config.json"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"num_attention_heads": 3}, "3 query heads do not divide over 2 kv heads"),
        ({"eos_token_id": 97}, "end token 97 has no row in the embedding (0 to 96)"),
        ({"eos_token_id": "</s>"}, "eos_token_id in config.json='</s>' must be a token id"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id in config.json=[1, '</s>'] must be a token id"),
        ({"pad_token_id": "x"}, "pad_token_id in config.json='x' must be a token id"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive number"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4' must be a positive number"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5 must be a whole number"),
        ({"vocab_size": True}, "vocab_size=True must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a positive number"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], not an object"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0 must be a positive number"),
    ],
)
def test_config_that_cannot_be_served(single, changes, part):
    (single / "generation_config.json").unlink()
    change_config(single, **changes)
    refused(single, part)


def test_unknown_param_dtype(single):
    with pytest.raises(ValueError, match="param_dtype is 'int8': use one of float32, bfloat16, float16"):
        hf.load(single, tokenizer=False, param_dtype="int8")


def test_token_ids_past_the_embedding(single):
    from mara_jax.hf import tokenizer

    tokenizer.nano(["1 2"], vocab_size=260).save_pretrained(single)
    refused(single, "the tokenizer has the id 258", "rows 0 to 96", tokenizer=True)


def test_end_tokens_come_from_the_generation_config_first(single):
    change_config(single, "generation_config.json", eos_token_id=[9, 4])
    assert hf.load(single, tokenizer=False)[0].eos_ids == (4, 9)
    change_config(single, "generation_config.json", eos_token_id=7)
    assert hf.load(single, tokenizer=False)[0].eos_ids == (7,)
    (single / "generation_config.json").unlink()
    assert hf.load(single, tokenizer=False)[0].eos_ids == (1,)
    change_config(single, eos_token_id=None)
    assert hf.load(single, tokenizer=False)[0].eos_ids == ()


def test_older_spelling_of_rope_settings(single):
    change_config(single, rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 3.0})
    arch = hf.load(single, tokenizer=False)[0].architecture
    assert (arch.rope_theta, arch.rope_scaling.kind, arch.rope_scaling.factor) == (500.0, "linear", 3.0)


def test_bfloat16_on_disk_loads_as_the_same_numbers_in_float32(tmp_path):
    torch_models.save("qwen2-tied", tmp_path, dtype=torch.bfloat16)
    _, params = hf.load(tmp_path, tokenizer=False)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(params["layers_0"]["up"]["kernel"], stored.astype(np.float32).T)
    assert params["layers_0"]["up"]["kernel"].dtype == np.float32
