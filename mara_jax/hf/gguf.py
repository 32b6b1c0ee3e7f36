"""GGUF files (llama.cpp's format) seen as Hugging Face checkpoints: configuration and dequantised tensors."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mara_jax.hf.config_keys import GGUF as GGUF_KEYS
from mara_jax.hf.files import refuse_pointer
from mara_jax.policies.families import FAMILIES

_FAMILIES = ("llama", "qwen2", "qwen3")  # by llama.cpp's name, which is model_type; llama is Mistral's too

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name stays as it is, and is then unexpected."""
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if parts and parts[2] in _IN_LAYER:
        return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.{parts[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else name


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of q and k.

    llama.cpp rotates neighbouring channels (2i, 2i + 1), Hugging Face channels (i, i + h/2); so its converter
    interleaves the two halves of each head. Rows here are output channels, head by head.
    """
    rows, inputs = array.shape[0], array.shape[1:]
    return array.reshape(heads, rows // heads // 2, 2, *inputs).swapaxes(1, 2).reshape(rows, *inputs)


class GGUF:
    """The tensors of one GGUF file under their Hugging Face names, dequantised to float32 as they are read.

    `config` is the config.json that its metadata amount to; `reader` the open gguf.GGUFReader.
    errors: FileNotFoundError where there is no such file; ValueError where it is not whole or not of a known
        family.
    """

    def __init__(self, file: Path):
        import gguf

        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: give a .gguf file")
        refuse_pointer(file)
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{file} is not a GGUF file (it does not begin with GGUF): download it again")
        try:
            self.reader = gguf.GGUFReader(file)
        except Exception as error:  # the reader runs off the end of a short file, in one of several ways
            reason = " ".join(str(error).split())
            if "GGMLQuantizationType" in reason or "version" in reason:
                raise ValueError(
                    f"{file} is of a newer or older kind than the package gguf {version('gguf')} reads ({reason}): "
                    "update that package, or take a file in F16, BF16 or Q8_0"
                ) from None
            raise ValueError(f"{file} is not a whole GGUF file ({reason}): download it again") from None
        self.source = str(file)
        self._last: tuple[str, np.ndarray] | None = None
        self._tensor_of = {hf_name(tensor.name): tensor for tensor in self.reader.tensors}
        self.config = self._config()

    def _get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def _refuse_other_kinds(self) -> None:
        """ValueError where the file is a part of a model, or no model."""
        files = self._get("split.count", 0)
        if files > 1:
            number = self._get("split.no", 0) + 1
            raise ValueError(
                f"{self.source} is one of {files} files, the {number}. part of a split model: merge them into one with "
                "llama-gguf-split --merge FIRST_FILE MERGED_FILE"
            )
        kind = self._get("general.type", "model")
        if kind != "model":
            raise ValueError(f"{self.source} is of the type {kind!r}, not a model: give the .gguf file of the model")

    def _config(self) -> dict[str, Any]:
        self._refuse_other_kinds()
        family = self._get("general.architecture")
        if family not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise ValueError(f"{self.source} has the unknown architecture {family!r}: this code knows {known}")
        if "rope_freqs.weight" in self._tensor_of:
            raise ValueError(
                f"{self.source} stores rope scaling as a tensor: load this model from its safetensors instead"
            )

        def need(key: str) -> Any:
            value = self._get(f"{family}.{key}")
            if value is None:
                raise ValueError(f"{self.source} lacks the metadata {family}.{key}: download it again")
            return value

        own = {key: self._get(key) for key in self.reader.fields if key.startswith(f"{family}.")}
        try:
            GGUF_KEYS.check({key.removeprefix(f"{family}."): value for key, value in own.items()})
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        for key, value in own.items():
            if isinstance(value, list):
                raise ValueError(
                    f"{self.source} has {key} for each layer: this code has one for all, choose another model"
                )
        heads, embed = need("attention.head_count"), need("embedding_length")
        head_dim = self._get(f"{family}.attention.key_length", embed // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._get(f"{family}.{key}", head_dim) != head_dim:
                raise ValueError(
                    f"{self.source} has {family}.{key}={own[f'{family}.{key}']}, but heads of {head_dim} channels: "
                    "this code has values as wide as keys and rotates all of a head, choose another model"
                )
        return {
            "architectures": [FAMILIES[family].model_class],
            "model_type": family,
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": embed,
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get(f"{family}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": need("feed_forward_length"),
            "hidden_act": "silu",
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(family),
            "sliding_window": self._get(f"{family}.attention.sliding_window"),
            "tie_word_embeddings": "lm_head.weight" not in self._tensor_of,
            "max_position_embeddings": need("context_length"),
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._end_ids(),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id"),
        }

    def _rope(self, family: str) -> dict[str, Any]:
        """Rotary settings as transformers 5 writes them."""
        theta = self._get(f"{family}.rope.freq_base", 10000.0)
        factor = self._get(f"{family}.rope.scaling.factor") or self._get(f"{family}.rope.scale_linear") or 1.0
        # llama.cpp takes a factor without a type as that of linear scaling.
        kind = self._get(f"{family}.rope.scaling.type", "linear")
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return {"rope_theta": theta, "rope_type": "default"}
        return {"rope_theta": theta, "rope_type": kind, "factor": factor}

    def _end_ids(self) -> list[int]:
        """End of sequence and, where the file names one, end of turn."""
        named = (self._get("tokenizer.ggml.eos_token_id"), self._get("tokenizer.ggml.eot_token_id"))
        return sorted({int(token) for token in named if token is not None})

    def names(self):
        """Hugging Face names of the tensors in the file."""
        return self._tensor_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, [out, in] for a matrix."""
        if name not in self._tensor_of:
            raise ValueError(f"{self.source} lacks {name}: download it again")
        return tuple(int(dim) for dim in reversed(self._tensor_of[name].shape))  # GGUF counts the fastest axis first

    def dtype(self, name: str) -> str:
        """Of the numbers that `read` returns, as safetensors calls it."""
        return "F32"

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, the rows of q and k in Hugging Face's order."""
        import gguf

        tensor = self._tensor_of[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        except NotImplementedError:
            raise ValueError(
                f"{self.source} holds {tensor.name} in {tensor.tensor_type.name}, which the package gguf "
                f"{version('gguf')} does not read: take a file in F16, BF16, Q8_0 or another common type"
            ) from None
        if self.config["model_type"] == "llama" and ".self_attn.q_proj." in name:
            return unpermute(array, self.config["num_attention_heads"])
        if self.config["model_type"] == "llama" and ".self_attn.k_proj." in name:
            return unpermute(array, self.config["num_key_value_heads"])
        return array

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor; the whole is dequantised once for slices asked for in a row."""
        if self._last is None or self._last[0] != name:
            self._last = (name, self.read(name))
        return self._last[1][index]
