"""Our Llama against transformers', and what a Llama's shape may be."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import command, expect_error, expect_ok, write_shards
from test_train import records, run

from families import SIZES, from_pretrained, resized, shape_from
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.memory import flops_per_token

transformers = pytest.importorskip("transformers")
BASE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
}
CONFIGS = {  # what differs from BASE, and parts of our shape
    "as many keys as queries": ({}, {"n_kv_head": 4, "rope_theta": 1e4, "tied": False}),
    "grouped queries": ({"num_key_value_heads": 2, "num_hidden_layers": 2}, {"n_kv_head": 2}),
    "one key for all queries": ({"num_key_value_heads": 1}, {"n_kv_head": 1}),
    "tied, another base, 4 layers": (
        {"tie_word_embeddings": True, "rope_theta": 5e5, "num_hidden_layers": 4},
        {"tied": True, "rope_theta": 5e5, "n_layer": 4},
    ),
}


def hf_llama(folder, differences, **options):
    """A random Llama of transformers, saved; bytes as tokens."""
    torch.manual_seed(0)
    settings = BASE | {"num_key_value_heads": 4, "bos_token_id": 256, "eos_token_id": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | differences)).eval()
    for p in model.parameters():  # also the gains, which start as constants
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder, **options)
    return model


def tokens(B, T, seed=1):
    return torch.randint(0, 257, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_losses_and_gradients_equal_transformers(case, tmp_path):
    differences, parts = CONFIGS[case]
    theirs = hf_llama(tmp_path, differences)
    ours = from_pretrained(str(tmp_path)).eval()
    assert isinstance(ours, Llama)
    assert asdict(ours.config).items() >= parts.items()
    idx = tokens(5, 49)
    x, y = idx[:, :-1], idx[:, 1:]
    expected = theirs(x).logits
    torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)
    losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), y, reduction="none")
    torch.testing.assert_close(ours(x, y), losses, atol=1e-4, rtol=0)
    losses.mean().backward()
    ours(x, y).mean().backward()
    attention = theirs.model.layers[1].self_attn
    matrices = (attention.q_proj, attention.k_proj, attention.v_proj)
    gradient = torch.cat([matrix.weight.grad for matrix in matrices])
    torch.testing.assert_close(ours.h[1].attn.c_attn.weight.grad, gradient, atol=1e-4, rtol=1e-4)
    embedding = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours.wte.weight.grad, embedding, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back_again(case, tmp_path):
    """Weights in parts, as large models are published, and without the rows of padding."""
    hf_llama(tmp_path / "first", CONFIGS[case][0], max_shard_size="100KB")
    assert (tmp_path / "first" / "model.safetensors.index.json").is_file()
    before = from_pretrained(str(tmp_path / "first"))
    before.to_pretrained(200, 199).save_pretrained(tmp_path / "second")
    after = Llama.from_pretrained(str(tmp_path / "second"))
    assert after.config == replace(before.config, vocab_size=200)
    weights = after.state_dict()
    assert weights.keys() == before.state_dict().keys()
    for name, weight in before.state_dict().items():
        assert torch.equal(weight[: len(weights[name])], weights[name])
    content = json.loads((tmp_path / "second" / "config.json").read_text())
    assert (content["eos_token_id"], content["vocab_size"]) == (199, 200)


def test_parts_of_a_gpt2_are_read_too(tmp_path):
    config = transformers.GPT2Config(vocab_size=211, n_positions=48, n_embd=64, n_layer=3, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = from_pretrained(str(tmp_path)).eval()
    x = tokens(2, 9) % 211
    assert isinstance(ours, GPT)
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


def changed(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8,
}
WRONG = {  # keys of config.json -> words of the error
    "attention bias": ({"attention_bias": True}, ["attention_bias True", "only False"]),
    "MLP bias": ({"mlp_bias": True}, ["mlp_bias True"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act gelu", "silu"]),
    "head size": ({"head_dim": 32}, ["head_dim 32", "16"]),
    "norm": ({"rms_norm_eps": 1e-6}, ["rms_norm_eps 1e-06", "1e-05"]),
    "scaled positions": (
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        ["rope scaling llama3", "default"],
    ),
    "scaled positions, version 4": (
        {"rope_scaling": LLAMA3, "rope_theta": 5e5, "rope_parameters": None},
        ["rope scaling llama3"],
    ),
    "another family": ({"model_type": "mistral"}, ["type mistral", "gpt2 or llama"]),
    "no width": ({"hidden_size": None}, ["cannot be opened"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_computed_here_is_refused(case, sample_data, tmp_path):
    settings, words = WRONG[case]
    hf_llama(tmp_path / "source", {})
    changed(tmp_path / "source", **settings)
    flags = (
        "--block_size=32",
        "--dropout=0",
        "--data_dir",
        sample_data,
        "--out_dir",
        tmp_path / "o",
    )
    done = command("train.py", "--init_from", tmp_path / "source", "--device=cpu", *flags)
    expect_error(done, *words)


def test_a_tied_head_that_is_another_matrix_and_a_missing_one(tmp_path):
    hf_llama(tmp_path, {})
    changed(tmp_path, tie_word_embeddings=True)
    done = command("eval/perplexity.py", "--hf", tmp_path, "--data_dir", tmp_path)
    expect_error(done, "lm_head.weight and model.embed_tokens.weight differ", "tied")
    hf_llama(tmp_path, {"tie_word_embeddings": True})
    changed(tmp_path, tie_word_embeddings=False)
    done = command("eval/perplexity.py", "--hf", tmp_path, "--data_dir", tmp_path)
    expect_error(done, "lack lm_head.weight", "restore")


def test_training_starts_from_a_llama_and_exports_it(sample_data, tmp_path):
    """Its first validation is the source's own; the export is the run's model."""
    theirs = hf_llama(tmp_path / "source", CONFIGS["grouped queries"][0])
    flags = ("--block_size=32", "--dropout=0", "--device=cpu", "--eval_windows=4")
    flags += ("--global_batch_size=8", "--data_dir", sample_data, "--warmup_steps=1")
    start = ("train.py", "--init_from", tmp_path / "source", "--out_dir", tmp_path / "run", *flags)
    expect_error(command(*start, "--dropout=0.1"), "--dropout 0.1: a Llama has none")
    expect_ok(command(*start, "--max_steps=2"))
    run_data = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run_data["model"] == "from_source"
    (at_start, *_) = records(tmp_path / "run", "eval")
    expect_ok(
        command(
            "eval/perplexity.py",
            "--hf",
            tmp_path / "source",
            "--block_size=32",
            "--windows=4",
            "--data_dir",
            sample_data,
            "--to",
            tmp_path / "ppl.json",
        )
    )
    scored = json.loads((tmp_path / "ppl.json").read_text())
    assert scored["mean_loss"] == pytest.approx(at_start["mean_loss"], abs=1e-5)
    expect_ok(command("scripts/export_hf.py", "--run", tmp_path / "run"))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").eval()
    ours = checkpoint.load_model(checkpoint.find_latest(tmp_path / "run")).eval()
    assert isinstance(exported, transformers.LlamaForCausalLM)
    x = tokens(2, 30)
    torch.testing.assert_close(exported(x).logits, ours(x), atol=1e-4, rtol=0)
    assert not torch.allclose(exported(x).logits, theirs(x).logits, atol=1e-3)


def test_a_size_is_all_that_a_user_changes(sample_data, tmp_path):
    """With the recipe of GPT-2, dropout included: a Llama has none."""
    out = tmp_path / "run"
    flags = ("--model=llama_tiny", "--n_layer=1", "--reweight=linupper")
    text = expect_ok(run(sample_data, out, *flags, "--max_steps=6", "--dropout=0.1"))
    assert "dropout 0.0" in text and "295,296 parameters" in text
    assert json.loads((out / "config.json").read_text())["dropout"] == 0
    first, last = records(out, "eval")
    assert last["mean_loss"] < first["mean_loss"] - 0.3
    text = expect_ok(run(sample_data, out, *flags, "--max_steps=8", "--dropout=0"))
    assert "resumed from" in text
    done = run(sample_data, tmp_path / "other", *flags, "--dropout=0.2")
    expect_error(done, "--dropout 0.2: a Llama has none", "--dropout 0")


def test_other_layers_heads_and_widths():
    row = SIZES["llama_1b"]
    assert resized(row, 0, 0, 0) == row
    narrow = resized(row, 2, 16, 1024)
    assert (narrow.n_layer, narrow.n_head, narrow.n_kv_head, narrow.n_ffn) == (2, 16, 8, 4096)
    assert resized(SIZES["llama_1.4b"], 0, 8, 0).n_kv_head == 8  # as many as queries
    for shape, words in (
        ((0, 12, 0), "--n_embd 2048: is not a multiple of twice --n_head 12; use 2040"),
        ((0, 4, 0), "--n_head 4: must be a multiple of the 8 heads of keys and values"),
        ((0, 64, 2112), "--n_embd 2112"),
    ):
        with pytest.raises(ValueError, match=words):
            resized(row, *shape)


def test_shapes_of_old_checkpoints_are_gpt2s():
    old = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 64}
    assert shape_from(old) == GPTConfig(**old)
    for shape in (GPTConfig(2, 2, 16), SIZES["llama_1b"]):
        assert shape_from(asdict(shape)) == shape


def test_flops_per_token_by_hand():
    """Of every matrix product; the embedding of an untied head is only looked up."""
    shape = LlamaConfig(1, 2, 8, n_kv_head=1, n_ffn=24, block_size=16, vocab_size=64)
    gains, attention, mlp, head = 3 * 8, 8 * (8 + 4 + 4) + 8 * 8, 3 * 8 * 24, 64 * 8
    products = 2 * 2 * 8 * 16 * 3
    for tied in (False, True):
        expected = 6 * (gains + attention + mlp + head) + products
        assert flops_per_token(replace(shape, tied=tied)) == expected


def test_perplexity_equals_a_float64_loop(tmp_path):
    """Of a local folder, on every window."""
    theirs = hf_llama(tmp_path / "hf", CONFIGS["tied, another base, 4 layers"][0]).double()
    ids = {
        name: tokens(1, 330, seed).flatten().numpy() % 257
        for seed, name in enumerate(("c4", "book"))
    }
    write_shards(tmp_path / "data", {name: {"val": values} for name, values in ids.items()})
    flags = ("--data_dir", tmp_path / "data", "--to", tmp_path / "result.json")
    expect_ok(command("eval/perplexity.py", "--hf", tmp_path / "hf", *flags))
    result = json.loads((tmp_path / "result.json").read_text())
    for name, values in ids.items():
        losses = []
        for start in range(0, len(values) - 48, 48):
            window = torch.from_numpy(values[start : start + 49].astype(np.int64))
            with torch.no_grad():
                logits = theirs(window[None, :-1]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        assert result["domains"][name]["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
