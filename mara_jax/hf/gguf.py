"""GGUF files (llama.cpp's format) seen as Hugging Face checkpoints: configuration and dequantised tensors."""

import re
from pathlib import Path
from typing import Any

import numpy as np

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
        try:
            self.reader = gguf.GGUFReader(file)
        except Exception as error:  # the reader runs off the end of a short file, in one of several ways
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} is not a whole GGUF file ({reason}): download it again") from None
        self.source = str(file)
        self._last: tuple[str, np.ndarray] | None = None
        self._tensor_of = {hf_name(tensor.name): tensor for tensor in self.reader.tensors}
        self.config = self._config()

    def _get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def _config(self) -> dict[str, Any]:
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

        heads, embed = need("attention.head_count"), need("embedding_length")
        rope: dict[str, Any] = {
            "rope_theta": self._get(f"{family}.rope.freq_base", 10000.0),
            "rope_type": "default",
        }
        scaling = self._get(f"{family}.rope.scaling.type", "none")
        if scaling != "none":
            rope |= {"rope_type": scaling, "factor": self._get(f"{family}.rope.scaling.factor", 1.0)}
        return {
            "architectures": [FAMILIES[family].model_class],
            "model_type": family,
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": embed,
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get(f"{family}.attention.head_count_kv", heads),
            "head_dim": self._get(f"{family}.attention.key_length", embed // heads),
            "intermediate_size": need("feed_forward_length"),
            "hidden_act": "silu",
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
            "rope_parameters": rope,
            "tie_word_embeddings": "lm_head.weight" not in self._tensor_of,
            "max_position_embeddings": need("context_length"),
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._end_ids(),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id"),
        }

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

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, the rows of q and k in Hugging Face's order."""
        import gguf

        tensor = self._tensor_of[name]
        array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
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
