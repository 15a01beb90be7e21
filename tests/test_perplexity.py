"""eval/perplexity.py against plain float64 loops over single windows, and against transformers."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, expect_error, expect_ok, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from corpus import tokenizer
from corpus.manifest import DOMAINS, in_order, read_manifest
from eval.perplexity import evaluate, find_document_ends, score
from model import GPT, GPTConfig
from runtime import checkpoint

T = 16


def random_tokens(n, seed):
    return np.random.default_rng(seed).integers(0, 257, n)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Three domains: one in three shards, the last without a window; one with a single window."""
    tokens = {
        "arxiv": {"val": random_tokens(170, 1)},
        "c4": {"val": random_tokens(20, 2)},
        "github": {"val": random_tokens(68, 3)},
    }
    return write_shards(tmp_path_factory.mktemp("data"), tokens, shard_tokens=80)


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A run folder whose model has losses that depend on the context."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=320))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = tmp_path_factory.mktemp("runs") / "run"
    state = {
        "gpt": asdict(model.config),
        "identity": {"dtype": "float32"},
        "data_dir": str(data_dir),
        "tokenizer_sha256": tokenizer.load("bytes").sha256,
    }
    checkpoint.save(out, 7, (model.state_dict(), {}), state, keep=1)
    return out


def open_split(folder, block_size=T):
    return data.Split(folder, read_manifest(folder), "val", block_size)


def reference(losses_of, folder, stride, block_size=T):
    """{domain: mean loss of each window} by a loop over every shard.

    losses_of: (T,) inputs, (T,) targets -> (T,).
    """
    windows = {}
    for domain, splits in read_manifest(folder)["domains"].items():
        for shard in splits["val"]:
            tokens = torch.from_numpy(np.load(folder / shard["file"]).astype(int))
            end = (len(tokens) - 1) // block_size * block_size  # the last target of a window
            scored, begin = [], 0
            while len(scored) < end:
                begin = min(begin, end - block_size)
                losses = losses_of(
                    tokens[begin : begin + block_size], tokens[begin + 1 : begin + block_size + 1]
                )
                scored += losses[len(scored) - begin :].tolist()
                begin += stride
            windows.setdefault(domain, []).extend(
                np.reshape(scored, (-1, block_size)).mean(1).tolist()
            )
    return {domain: values for domain, values in windows.items() if values}


def float64_losses(logits_of):
    @torch.no_grad()
    def losses_of(x, y):
        return -torch.log_softmax(logits_of(x[None])[0], -1)[torch.arange(len(y)), y]

    return losses_of


def check(result: Path, windows, folder):
    record, saved = (
        json.loads(result.read_text()),
        np.load(result.with_name(f"{result.stem}_windows.npz")),
    )
    info = read_manifest(folder)["domains"]
    keys = [*windows, *(f"documents/{domain}" for domain in windows)]
    assert list(saved) == keys and list(record["domains"]) == list(windows)
    for domain, found in record["domains"].items():
        loss = np.mean(windows[domain])
        tokens, n_bytes = (
            sum(shard[key] for shard in info[domain]["val"]) for key in ("tokens", "bytes")
        )
        assert found["loss"] == pytest.approx(loss, abs=1e-6) and found["ppl"] == pytest.approx(
            math.exp(loss)
        )
        assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) * tokens / n_bytes)
        assert found["tokens"] == len(windows[domain]) * record["block_size"]
        assert saved[domain].dtype == np.float32
        np.testing.assert_allclose(saved[domain], windows[domain], atol=1e-6)
    means = {d: np.mean(v) for d, v in windows.items()}
    assert record["mean_loss"] == pytest.approx(np.mean(list(means.values())), abs=1e-6)
    assert record["worst_domain"] == max(means, key=means.get)
    return record


@pytest.mark.parametrize("ranks, strides", [(1, (T, T // 2, 5, 1)), (2, (T, 5))])
def test_equals_a_float64_loop(run, data_dir, tmp_path, ranks, strides):
    model = checkpoint.load_model(checkpoint.find_latest(run)).double().eval()
    hashes = []
    for stride in strides:
        result = tmp_path / f"{stride}.json"
        flags = [] if stride == T else [f"--stride={stride}"]
        expect_ok(
            command(
                "eval/perplexity.py",
                "--run",
                run,
                "--to",
                result,
                "--batch_size=3",
                *flags,
                ranks=ranks,
            )
        )
        record = check(result, reference(float64_losses(model), data_dir, stride), data_dir)
        assert (record["step"], record["stride"], record["block_size"]) == (7, stride, T)
        hashes.append(record["val_hash"])
    assert len(set(hashes)) == len(strides)


def test_shorter_windows_and_the_default_place(run, data_dir):
    text = expect_ok(
        command(
            "eval/perplexity.py", "--run", run / "checkpoints" / "step_00000007", "--block_size=8"
        )
    )
    model = checkpoint.load_model(checkpoint.find_latest(run)).double().eval()
    record = check(
        run / "eval" / "perplexity.json", reference(float64_losses(model), data_dir, 8, 8), data_dir
    )
    assert f"{record['domains']['arxiv']['bits_per_byte']:.4f}" in text and "95 % interval" in text


def test_the_windows_of_domains_with_any_name(run, tmp_path):
    """np.savez would take "file" and "allow_pickle" for parameters of its own."""
    names = ("file", "args", "kwds", "allow_pickle", "arr_0", "self", "c4")
    tokens = {name: {"val": random_tokens(60, i)} for i, name in enumerate(names)}
    folder = write_shards(tmp_path / "data", tokens)
    result = tmp_path / "p.json"
    ask = ("eval/perplexity.py", "--run", run, "--data_dir", folder, "--to", result)
    expect_ok(command(*ask))
    model = checkpoint.load_model(checkpoint.find_latest(run)).double().eval()
    expected = reference(float64_losses(model), folder, T)
    check(result, {name: expected[name] for name in in_order(expected)}, folder)


def test_a_few_windows_for_a_quick_look(run, data_dir, tmp_path):
    before = sorted((run / "eval").glob("*")) if (run / "eval").exists() else []
    ask = ("eval/perplexity.py", "--run", run, "--windows", 2)
    text = expect_ok(command(*ask))
    assert "arxiv" in text and "average" in text and "interval" not in text
    assert (sorted((run / "eval").glob("*")) if (run / "eval").exists() else []) == before
    expect_ok(command(*ask, "--to", tmp_path / "quick.json"))
    record = json.loads((tmp_path / "quick.json").read_text())
    assert record["domains"]["arxiv"]["tokens"] == 2 * T
    expect_error(command(*ask, "--stride", 2), "--stride scores all windows")
    expect_error(command(*ask[:-1], 0), "--windows 0")


class Told(torch.nn.Module):
    """A model whose loss is the target's id ("target") or the number of tokens seen ("context")."""

    def __init__(self, what):
        super().__init__()
        self.what, self.none = what, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return (
            y.float() if self.what == "target" else torch.arange(1.0, y.size(1) + 1).expand(y.shape)
        )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 9),
    st.integers(1, 9),
    st.integers(1, 7),
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.integers(10, 40),
)
def test_every_stride_scores_the_same_targets_once(
    tmp_path_factory, block_size, stride, batch, lengths, shard_tokens
):
    tokens = {d: {"val": random_tokens(n, n)} for d, n in zip(DOMAINS, lengths, strict=False)}
    split = open_split(write_shards(tmp_path_factory.mktemp("d"), tokens, shard_tokens), block_size)
    if not split.n_windows.sum():
        return
    pairs = data.validation_windows(split, None)
    expected = [split.window(*pair)[1:].mean() for pair in pairs]
    got = score(Told("target"), split, pairs, batch, "float32", stride=min(stride, block_size))
    np.testing.assert_allclose(got.windows, expected, rtol=1e-6)


def test_a_stride_leaves_at_least_t_minus_stride_tokens_of_context(data_dir):
    split = open_split(data_dir)
    pairs = data.validation_windows(split, None)
    for stride in (1, 4, 8):
        got = score(Told("context"), split, pairs, 3, "float32", stride).windows
        first = np.isin(np.arange(len(pairs)), [0, 4, 8, 9])  # windows at the start of a shard
        assert got[first] == pytest.approx((T + 1) / 2)
        assert got[~first] == pytest.approx(T - (stride - 1) / 2)


def test_the_record_of_training(data_dir):
    split = open_split(data_dir)
    few, model = data.validation_windows(split, 2), Told("target").train()
    record = evaluate(model, split, few, 4, "float32")
    assert set(record) == {"domains", "mean_loss", "worst_domain", "val_hash"} and model.training
    assert {key for d in record["domains"].values() for key in d} == {
        "loss",
        "ppl",
        "tokens",
        "bits_per_byte",
    }
    expected = np.mean([split.window(0, i)[1:].mean() for i in few[few[:, 0] == 0, 1]])
    assert record["domains"]["arxiv"]["loss"] == pytest.approx(expected)
    assert record["domains"]["arxiv"]["tokens"] == 2 * T
    assert (
        record["val_hash"]
        != evaluate(model, split, data.validation_windows(split, None), 4, "float32")["val_hash"]
    )


def test_documents_are_scored_whole(tmp_path):
    """Against a loop over the tokens: documents across windows and shards, and in what is left."""
    eot = 256
    tokens = random_tokens(400, 1) % 250
    tokens[[0, 3, 4, 30, 95, 96, 200, 201, 202, 311]] = eot
    folder = write_shards(tmp_path / "d", {"c4": {"val": tokens}, "book": {"val": tokens[:T]}}, 90)
    split = open_split(folder)
    expected, nats, targets = [], 0.0, 0
    for shard in read_manifest(folder)["domains"]["c4"]["val"]:
        content = np.load(folder / shard["file"])
        in_windows = (len(content) - 1) // T * T
        for i, token in enumerate(content.tolist()):
            if 0 < i <= in_windows:
                nats += token
                targets += 1
            if i and token == eot and targets:
                expected.append((nats, targets))
                nats, targets = 0.0, 0
    if targets:
        expected.append((nats, targets))
    pairs, ends = data.validation_windows(split, None), find_document_ends(split)
    for stride in (None, 5, 1):
        book, c4 = score(Told("target"), split, pairs, 3, "float32", stride, ends).documents
        assert len(book) == 0
        np.testing.assert_allclose(c4, expected)
        assert c4[:, 1].sum() == len(pairs) * T


def test_the_file_beside_a_result_has_its_documents(run, data_dir, tmp_path):
    result = tmp_path / "p.json"
    text = expect_ok(command("eval/perplexity.py", "--run", run, "--to", result))
    record, saved = json.loads(result.read_text()), np.load(tmp_path / "p_windows.npz")
    for domain, found in record["domains"].items():
        nats, targets = saved[f"documents/{domain}"].T
        assert len(nats) == found["documents"] and targets.sum() == found["tokens"]
        assert nats.sum() / targets.sum() == pytest.approx(found["loss"])
    assert "documents" in text


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A local GPT-2 over bytes, 24 tokens of context, without tokenizer files."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=257,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=256,
        eos_token_id=256,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    return model.double(), folder


def test_a_hugging_face_gpt2(hf, data_dir, tmp_path):
    theirs, folder = hf
    result = tmp_path / "new" / "gpt2.json"
    losses_of = float64_losses(lambda x: theirs(x).logits)
    for flags, block_size, stride in (([], 24, 24), (["--block_size=16", "--stride=4"], 16, 4)):
        done = command(
            "eval/perplexity.py", "--hf", folder, "--data_dir", data_dir, "--to", result, *flags
        )
        expect_ok(done)
        assert ("c4" in done.stderr) == (block_size == 24)  # 20 tokens: too few for a window of 24
        record = check(result, reference(losses_of, data_dir, stride, block_size), data_dir)
        assert record["hf"] == str(folder)
    before = sorted(folder.iterdir())
    text = expect_ok(command("eval/perplexity.py", "--hf", folder, "--data_dir", data_dir))
    assert "average" in text and sorted(folder.iterdir()) == before


def test_a_hugging_face_gpt2_with_a_padded_vocabulary(hf, data_dir, tmp_path):
    import transformers

    theirs = transformers.GPT2LMHeadModel.from_pretrained(hf[1])
    ask = ("eval/perplexity.py", "--data_dir", data_dir, "--to", tmp_path / "p.json", "--hf")
    theirs.resize_token_embeddings(320)
    theirs.save_pretrained(tmp_path / "padded")
    expect_ok(command(*ask, tmp_path / "padded"))
    theirs = theirs.double().eval()
    expected = reference(float64_losses(lambda x: theirs(x).logits), data_dir, 24, 24)
    check(tmp_path / "p.json", expected, data_dir)
    for rows in (321, 256):
        theirs.resize_token_embeddings(rows)
        theirs.float().save_pretrained(tmp_path / "other")
        expect_error(command(*ask, tmp_path / "other"), f"{rows} rows", "none of gpt2, bytes")


def test_hf_must_be_a_gpt2_with_the_datas_tokens(hf, data_dir, tmp_path):
    import shutil

    import transformers
    from tokenizers import Tokenizer, models

    ask = ("eval/perplexity.py", "--data_dir", data_dir, "--hf")
    folder = shutil.copytree(hf[1], tmp_path / "other")
    vocab = {chr(0x4E00 + i): i for i in range(257)}
    own = Tokenizer(models.WordLevel({**vocab, "[UNK]": 257}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(
        folder
    )
    expect_error(command(*ask, folder), "none of gpt2, bytes")
    (folder / "tokenizer.json").write_text("{")
    expect_error(command(*ask, folder), f"{folder}: its tokenizer cannot be opened", "restore")
    (folder / "config.json").write_text(
        (hf[1] / "config.json").read_text().replace('"gpt2"', '"bloom"')
    )
    expect_error(command(*ask, folder), "type bloom", "gpt2 or llama")
    large = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50257, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    )
    large.save_pretrained(tmp_path / "large")
    expect_error(command(*ask, tmp_path / "large"), "tokenizer bytes", "the model gpt2")
    (tmp_path / "large" / "model.safetensors").write_bytes(b"cut")
    expect_error(command(*ask, tmp_path / "large"), "large", "model.safetensors")
    expect_error(command(*ask, tmp_path / "none"), "none", "hub")
    expect_error(command("eval/perplexity.py", "--hf", folder), "--data_dir")


def test_hf_with_a_head_of_its_own_is_refused(hf, data_dir, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(hf[1], tmp_path / "untied")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = command("eval/perplexity.py", "--data_dir", data_dir, "--hf", folder)
    expect_error(done, "lm_head.weight", "wte.weight", "differ")


def test_the_benchmark_prints_a_ratio(data_dir):
    flags = ("--data_dir", data_dir, "--block_size=8", "--batch_size=2")
    ask = ("scripts/bench.py", "eval", *flags)
    text = expect_ok(command(*ask, "--rounds=2"))
    assert 0.1 < float(text.split("perplexity / bare forward: ")[1].split()[0]) < 10
    expect_error(command(*ask, "--rounds=0"), "--rounds")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stride=17"], ["--stride 17", "16"]),
        (["--stride=0"], ["--stride 0"]),
        (["--stride=x"], ["--stride", "'x'"]),
        (["--block_size=17"], ["--block_size 17", "16"]),
        (["--batch_size=-1"], ["--batch_size -1"]),
        (["--dtype=half"], ["--dtype", "float32"]),
        (["--hf=gpt2"], ["--hf", "--run"]),
        (["--strid=4"], ["'--stride'"]),
        (["--data_dir=none"], ["'none' not found"]),
        (["--to=tests"], ["tests", "folder"]),
        (["--to=README.md/x.json"], ["README.md"]),
    ],
)
def test_wrong_flags(run, flags, words):
    expect_error(command("eval/perplexity.py", "--run", run, *flags), *words)


def test_wrong_runs(run, data_dir, tmp_path):
    expect_error(command("eval/perplexity.py"), "--run", "--hf")
    expect_error(command("eval/perplexity.py", "--run", tmp_path), "no checkpoint")
    short = write_shards(tmp_path / "short", {"c4": {"val": np.arange(T)}})
    expect_error(
        command("eval/perplexity.py", "--run", run, "--data_dir", short),
        "no window",
        "--block_size",
    )
    state = checkpoint.find_latest(run) / "state.json"
    before = state.read_text()
    for text, words in (
        ("{", ["cannot be read"]),
        ('{"step": 7}', ["no gpt", "another version"]),
        (before.replace(tokenizer.load("bytes").sha256, "0"), ["none of gpt2, bytes"]),
    ):
        state.write_text(text)
        expect_error(command("eval/perplexity.py", "--run", run), *words)
    state.write_text(before)
