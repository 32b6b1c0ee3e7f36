"""Reward models against torch's *ForSequenceClassification: scores of sequences of several lengths, and exports."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
import transformers
from transformers import AutoModelForSequenceClassification

from mara_jax import hf
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import parameters, transformer
from mara_jax.policies.policy import Policy
from mara_jax.policies.scores import compiled_scores, sequence_scores
from mara_jax.train import preference, reward_model

LENGTHS = np.array([17, 40, 1, 2])
# The padding's id is 0, which no row holds: torch finds the last token by it.
TOKENS = np.where(np.arange(40) < LENGTHS[:, None], np.random.default_rng(0).integers(3, 97, (4, 40)), 0)
SCANNED = ("qwen3-own-head-dim", "olmo2-tied")


def classifier(name: str, labels: int = 1):
    """A random model of torch with a score head, norms and biases random too."""
    torch.manual_seed(1)
    config = torch_models.CONFIGS[name]()
    config.num_labels = labels
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            start = 1.0 if "norm" in key else 0.0
            parameter.copy_(start + 0.2 * torch.randn_like(parameter))
    return model.eval()


def torch_scores(model, tokens, lengths):
    mask = (torch.arange(tokens.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), attention_mask=mask).logits[:, 0].float().numpy()


@pytest.mark.parametrize("name", torch_models.CONFIGS)
def test_scores_match_torch_and_the_export_gives_them_again(name, tmp_path):
    model = classifier(name)
    model.save_pretrained(tmp_path / "in")
    policy, params = hf.load(tmp_path / "in", tokenizer=False, scan_layers=name in SCANNED, score_head=True)
    expected = torch_scores(model, TOKENS, LENGTHS)
    ours = np.asarray(compiled_scores(policy.architecture, params, TOKENS, LENGTHS))
    assert ours.dtype == np.float32 and np.std(expected) > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    # Of another token than the last the scores differ: the test would see it.
    assert np.abs(np.asarray(compiled_scores(policy.architecture, params, TOKENS, LENGTHS - (LENGTHS > 1))) - expected)[
        LENGTHS > 1
    ].min() > 1e-3  # fmt: skip
    hf.export(policy, params, tmp_path / "out")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(back) is type(model) and back.config.num_labels == 1
    np.testing.assert_array_equal(torch_scores(back, TOKENS, LENGTHS), expected)


def test_one_row_scores_as_in_a_batch(tmp_path):
    model = classifier("qwen2-tied")
    model.save_pretrained(tmp_path / "in")
    policy, params = hf.load(tmp_path / "in", tokenizer=False, score_head=True)
    for row, length in enumerate(LENGTHS):
        alone = compiled_scores(policy.architecture, params, TOKENS[row : row + 1, :length], LENGTHS[row : row + 1])
        np.testing.assert_allclose(alone, torch_scores(model, TOKENS, LENGTHS)[row : row + 1], atol=1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_a_language_model_gets_a_head_and_transformers_loads_it(tie, tmp_path):
    """As training leaves it, from weights without config.json; texts are encoded by the tokenizer beside them."""
    tokenizer = tokenizers.nano(["a b c"], 259)
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16, "tie_embeddings": tie, "max_positions": 64}
    arch = transformer.Architecture("qwen2", 259, 16, 1, **shape)
    base = Policy(arch, tokenizer, (0, 2), 0, {}, "random")
    policy, params = reward_model.begun(base, transformer.init(arch, jax.random.key(0)), jax.random.key(1))
    assert params.keys() == {"embed", "layers_0", "final_norm", "score"}
    assert parameters.count(policy.architecture) == sum(x.size for x in jax.tree.leaves(params))
    hf.export(policy, params, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Qwen2ForSequenceClassification"] and written["pad_token_id"] == 0
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["a b", "c", "a b c a b c"]
    chats = [[{"role": "user", "content": "q?"}, {"role": "assistant", "content": text}] for text in texts]
    batch = read([read.apply_chat_template(chat, tokenize=False) for chat in chats], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = back(**batch).logits[:, 0].numpy()
    loaded, params = hf.load(tmp_path / "out", score_head=True)
    again = reward_model.RewardModel(loaded, params)
    np.testing.assert_allclose(again.scores(again.encode(["q?"] * 3, texts)), theirs, atol=1e-4)


def test_what_ends_with_the_padding_token_is_scored_before_it_as_by_transformers():
    """Without a chat template, where the end token pads as well: transformers takes the last token that is neither."""
    tokenizer = tokenizers.nano(["a b c"], 259)
    tokenizer.chat_template, tokenizer.pad_token = None, tokenizer.eos_token
    ends = tokenizer.eos_token_id
    without = dataclasses.replace(Policy(None, tokenizer, (ends,), ends, {}, "x"), config={"pad_token_id": ends})
    plain = tokenizer.encode("q? a", add_special_tokens=False)
    assert reward_model.RewardModel(without, None).encode(["q?"], [" a"]) == [plain]
    other = dataclasses.replace(without, config={"pad_token_id": 0})
    assert reward_model.RewardModel(other, None).encode(["q?"], [" a"]) == [[*plain, ends]]
    with pytest.raises(ValueError, match="no chat template"):
        reward_model.RewardModel(other, None).encode([[{"role": "user", "content": "q?"}]], [" a"])


def refused(directory, *words, **choices):
    with pytest.raises(ValueError) as caught:
        hf.load(directory, tokenizer=False, **choices)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_what_is_no_reward_model_is_refused_and_a_reward_model_is_no_policy(tmp_path):
    classifier("llama-linear").save_pretrained(tmp_path / "one")
    refused(tmp_path / "one", "it is a reward model", "task.reward_model")
    classifier("llama-linear", labels=3).save_pretrained(tmp_path / "three")
    refused(tmp_path / "three", "3 labels", "a reward model has one", score_head=True)
    torch_models.save("llama-linear", tmp_path / "causal")
    refused(tmp_path / "causal", "python -m mara_jax.reward_model", score_head=True)
    # Where config.json says neither, the tensors tell.
    for name, word in (("causal", "lacks score.weight"), ("three", "3 labels")):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        kept = {key: value for key, value in config.items() if key not in ("architectures", "id2label", "label2id")}
        path.write_text(json.dumps(kept))
        refused(tmp_path / name, word, score_head=True)


@pytest.mark.parametrize("name", ["qwen2-untied", "olmo2-tied"])
def test_the_gradient_of_the_pairwise_loss_is_torchs(name, tmp_path):
    """Of every parameter, in float64, but for the rotary angles that both sides make in float32."""
    model = classifier(name)
    model.save_pretrained(tmp_path / "in")
    policy, params = hf.load(tmp_path / "in", tokenizer=False, scan_layers=name in SCANNED, score_head=True)
    theirs, tokens = model.double(), torch.tensor(TOKENS)
    scores = theirs(input_ids=tokens, attention_mask=(tokens != 0).long()).logits[:, 0]
    loss = -torch.nn.functional.logsigmoid(scores[0::2] - scores[1::2]).mean()
    loss.backward()
    expected = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}

    def ours_of(arch, params):
        scores_p2 = sequence_scores(arch, params, jnp.asarray(TOKENS), jnp.asarray(LENGTHS)).reshape(-1, 2)
        return preference.pair_loss(scores_p2[:, 0], scores_p2[:, 1])

    with jax.enable_x64(True):
        arch = dataclasses.replace(policy.architecture, compute_dtype="float64")
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        value, grads = jax.jit(jax.value_and_grad(lambda params: ours_of(arch, params)))(params)
        np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
        rows = parameters.table(arch)
        assert {row.name for row in rows} == expected.keys()
        for row in rows:
            array, largest = np.asarray(parameters.read(grads, row)), np.abs(expected[row.name]).max()
            array = array.T if row.transpose else array
            np.testing.assert_allclose(array, expected[row.name], rtol=0, atol=1e-5 * largest + 1e-12, err_msg=row.name)
