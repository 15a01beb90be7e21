"""Weights out to Hugging Face and in from it, against transformers and the evaluation harness."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow
import pytest
import torch
from conftest import command, expect_error, expect_ok, write_shards
from hypothesis import given, settings, strategies
from test_tokenizer import TRICKY
from test_train import SMALL, model_of, records, run, without_times

import data
import train
from cli import UserError
from corpus import tokenizer
from corpus.manifest import read_manifest
from families import build, from_pretrained
from llama import LlamaConfig
from model import GPT, GPTConfig
from runtime import checkpoint

safetensors, tokenizers, transformers = map(
    pytest.importorskip, ("safetensors", "tokenizers", "transformers")
)
BYTES, GPT2 = tokenizer.load("bytes"), tokenizer.load("gpt2")
TOKENS = {"bytes": BYTES, "gpt2": GPT2, "llama": BYTES}  # of each folder in `exported`


def export(run_dir, *flags):
    return command("scripts/export_hf.py", "--run", run_dir, *flags)


def write_run(folder, tokens, gpt):
    """A run folder with one checkpoint of a model whose weights are all random."""
    torch.manual_seed(1)
    model = build(gpt)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    checkpoint.save(
        folder,
        3,
        (model.state_dict(), {}),
        {"gpt": asdict(gpt), "max_steps": 5, "identity": {}, "tokenizer_sha256": tokens.sha256},
        1,
    )
    settings = asdict(
        train.TrainConfig(global_batch_size=4, block_size=gpt.block_size, data_dir="gone")
    )
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, its export) per tokenizer, and of a Llama; the vocabularies are padded."""
    gpt = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=320)
    llama = LlamaConfig(2, 4, 16, n_kv_head=2, n_ffn=40, block_size=24, vocab_size=320)
    shapes = {"bytes": gpt, "gpt2": replace(gpt, vocab_size=50304), "llama": llama}
    made = {}
    for name, tokens in TOKENS.items():
        folder = write_run(tmp_path_factory.mktemp(name) / "run", tokens, shapes[name])
        expect_ok(export(folder))
        made[name] = folder, folder / "hf"
    return made


@pytest.fixture(scope="module")
def hf_gpt2(tmp_path_factory):
    """A GPT-2 of transformers with a shape that is none of SIZES, 40 positions, bytes as tokens."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_positions=40, n_embd=48, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("hf") / "small"
    model.save_pretrained(folder)
    return model, folder


FIXED = tuple(
    flag for flag in SMALL if not flag.endswith(".py")
)  # without tiny_cpu.py, which names a --model


def start_from(source, sample_data, out, *flags, ranks=1):
    return command(
        "train.py",
        *FIXED,
        "--dropout=0",
        "--data_dir",
        sample_data,
        "--out_dir",
        out,
        "--init_from",
        source,
        *flags,
        ranks=ranks,
    )


@pytest.mark.parametrize("name", TOKENS)
def test_logits_of_the_export_are_ours(exported, name):
    run_dir, folder = exported[name]
    ours = checkpoint.load_model(checkpoint.find_latest(run_dir)).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    V = TOKENS[name].n_vocab
    idx = torch.randint(0, V, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(idx).logits
        assert logits.shape == (3, 24, V) and logits.dtype == torch.float32
        torch.testing.assert_close(ours(idx)[..., :V], logits, atol=1e-4, rtol=0)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == V - 1


@pytest.mark.parametrize("name", TOKENS)
def test_there_and_back_again(exported, name):
    run_dir, folder = exported[name]
    before = checkpoint.load_model(checkpoint.find_latest(run_dir)).state_dict()
    after = from_pretrained(folder).state_dict()
    assert before.keys() == after.keys() and len(before["wte.weight"]) > len(after["wte.weight"])
    assert all(torch.equal(before[key][: len(after[key])], after[key]) for key in before)


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_token_ids_of_the_export_are_ours(exported, name):
    ours, theirs = (
        tokenizer.load(name),
        transformers.AutoTokenizer.from_pretrained(exported[name][1]),
    )
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (
        ours.n_vocab,
        ours.eot_token,
        ours.eot_token,
    )

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(strategies.text() | strategies.text("ab 's\n\t.0é<|>"))
    def same(text):
        ids = ours.encode_to_numpy(text).tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text

    same()
    for text in [*TRICKY, "a<|endoftext|>b", "end  of\u00a0 text \u3000 \u200b", "x" + " " * 300]:
        ids = ours.encode_to_numpy(text).tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    assert theirs.decode([ours.eot_token]) == "<|endoftext|>"
    alone = tokenizers.Tokenizer.from_file(
        str(exported[name][1] / "tokenizer.json")
    )  # without transformers' settings
    assert alone.encode("no space before").ids == ours.encode_to_numpy("no space before").tolist()


def test_token_ids_on_real_text(exported, real_text):
    theirs, documents = transformers.AutoTokenizer.from_pretrained(exported["gpt2"][1]), 0
    for path in sorted((real_text / "validation").glob("*.jsonl.zst")):
        with pyarrow.CompressedInputStream(str(path), "zstd") as stream:
            for line in stream.read().splitlines()[:20]:
                text = json.loads(line)["text"]
                assert theirs(text)["input_ids"] == GPT2.encode_to_numpy(text).tolist()
                documents += 1
    assert documents > 100


def test_vocabulary_files_are_the_originals(exported):
    for file, sha256 in (
        ("vocab.json", tokenizer.ENCODER_JSON_SHA256),
        ("merges.txt", tokenizer.VOCAB_BPE_SHA256),
    ):
        assert hashlib.sha256((exported["gpt2"][1] / file).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("name", TOKENS)
def test_the_harness_opens_it(exported, name):
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    run_dir, folder = exported[name]
    backend, ours = HFLM(pretrained=str(folder), device="cpu", batch_size=2), TOKENS[name]
    model = checkpoint.load_model(checkpoint.find_latest(run_dir)).eval()
    pairs = [("The sky is", " blue"), ("", "naïve"), ("2 + 2 =", " 4")]
    got = backend.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    )
    for (context, continuation), (value, _) in zip(pairs, got, strict=True):
        prefix = ours.encode_to_numpy(context).tolist() or [ours.eot_token]
        ids = torch.tensor([prefix + ours.encode_to_numpy(continuation).tolist()])
        with torch.no_grad():
            logp = (
                model(ids)[0, :-1, : ours.n_vocab].double().log_softmax(-1)
            )  # without the padding
        expected = logp.gather(1, ids[0, 1:, None])[len(prefix) - 1 :].sum().item()
        assert value == pytest.approx(expected, abs=1e-3)


def test_model_card(sample_data, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    expect_ok(run(sample_data, tmp_path / "run", "--max_steps=3", "--reweight=linupper"))
    expect_ok(export(tmp_path / "run", "--to", tmp_path / "a"))
    text = (tmp_path / "a" / "README.md").read_text()
    assert (
        text.count("not evaluated") == 2 and "not SlimPajama" in text and str(tmp_path) not in text
    )
    assert "768 (3 steps x 8 sequences x 32)" in text and "| `reweight` | linupper |" in text
    found = huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md").data
    assert (found.license, found.library_name, found.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    tokens = np.arange(300) % 257
    write_shards(tmp_path / "few", {"book": {"val": tokens}, "c4": {"val": tokens}})
    expect_ok(
        command("eval/perplexity.py", "--run", tmp_path / "run", "--data_dir", tmp_path / "few")
    )
    task = {"metric": "acc,none", "score": 0.625, "stderr": None, "requests": 40, "truncated": 3}
    fewshot = {"step": 3, "num_fewshot": 5, "tasks": {"sciq": task}}
    (tmp_path / "run" / "eval" / "fewshot.json").write_text(json.dumps(fewshot))
    expect_ok(export(tmp_path / "run", "--to", tmp_path / "b"))
    text = (tmp_path / "b" / "README.md").read_text()
    loss = json.loads((tmp_path / "run" / "eval" / "perplexity.json").read_text())["domains"][
        "book"
    ]["loss"]
    assert f"| book | {loss:.4f} |" in text and "| sciq | acc | 0.6250 | none | 40 | 3 |" in text
    # another checkpoint's results are not this one's
    (tmp_path / "run" / "eval" / "fewshot.json").write_text(json.dumps({**fewshot, "step": 2}))
    expect_ok(export(tmp_path / "run"))
    assert (tmp_path / "run" / "hf" / "README.md").read_text().count("not evaluated") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        safetensors.SafetensorError("No space left on device (os error 28)"),
    ],
)
def test_the_folder_is_whole_or_absent(error, exported, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", full)
    expect_error(export(exported["bytes"][0], "--to", tmp_path / "out"), "No space left")
    assert not list(tmp_path.iterdir())


def test_first_loss_is_the_sources_own(hf_gpt2, sample_data, tmp_path):
    theirs, folder = hf_gpt2
    expect_ok(start_from(folder, sample_data, tmp_path / "one", "--max_steps=4"))
    expect_ok(
        start_from(
            folder, sample_data, tmp_path / "two", "--max_steps=4", "--micro_batch_size=2", ranks=2
        )
    )
    split = data.Split(sample_data, read_manifest(sample_data), "train", 32)
    sampler = data.DomainSampler(data.mixture_weights("uniform", split), split.n_windows, 8, 42)
    x, y, _ = data.read_batch(split, sampler.draw(0), pin=False)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(x).logits.transpose(1, 2), y).item()
    one, two = ([r["loss"] for r in records(tmp_path / name, "train")] for name in ("one", "two"))
    assert one[0] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(one, two, atol=1e-5)
    gpt = checkpoint.read_shape(checkpoint.find_latest(tmp_path / "one"))
    assert gpt == GPTConfig(
        3, 4, 48, block_size=32, vocab_size=257
    )  # no padding, later positions cut off
    assert json.loads((tmp_path / "one" / "config.json").read_text())["model"] == "from_small"


def test_a_head_equal_to_the_embedding_is_accepted(hf_gpt2, tmp_path):
    """A tied matrix may be in the file under both names, or under the head's alone."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(hf_gpt2[1], tmp_path / "source")
    add_head(folder, 1.0)
    expected = hf_gpt2[0].transformer.wte.weight
    assert torch.equal(GPT.from_pretrained(str(folder)).wte.weight, expected)
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.wte.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(GPT.from_pretrained(str(folder)).wte.weight, expected)


def test_no_code_of_a_source_is_trusted(hf_gpt2, tmp_path, monkeypatch):
    """False by name: left out, transformers would ask at the terminal."""
    folder = shutil.copytree(hf_gpt2[1], tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    calls = []

    def refuse(name, **options):
        calls.append(options)
        raise ValueError("not opened")

    for kind in (transformers.AutoTokenizer, transformers.GPT2LMHeadModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    with pytest.raises(UserError, match="not opened"):
        tokenizer.matches_hf_tokenizer(BYTES, str(folder))
    with pytest.raises(UserError, match="not opened"):
        GPT.from_pretrained(str(folder))
    assert [options.get("trust_remote_code") for options in calls] == [False, False]


def test_a_padded_vocabulary_as_source(hf_gpt2, sample_data, tmp_path):
    """The rows that pad it stay, so that the model computes what the source does."""
    theirs = transformers.GPT2LMHeadModel.from_pretrained(hf_gpt2[1])
    theirs.resize_token_embeddings(320)
    theirs.save_pretrained(tmp_path / "padded")
    expect_ok(start_from(tmp_path / "padded", sample_data, tmp_path / "out", "--max_steps=1"))
    shape = checkpoint.read_shape(checkpoint.find_latest(tmp_path / "out"))
    assert shape == GPTConfig(3, 4, 48, block_size=32, vocab_size=320)
    split = data.Split(sample_data, read_manifest(sample_data), "train", 32)
    sampler = data.DomainSampler(data.mixture_weights("uniform", split), split.n_windows, 8, 42)
    x, y, _ = data.read_batch(split, sampler.draw(0), pin=False)
    with torch.no_grad():
        logits = theirs.eval()(x).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y).item()
    loss = records(tmp_path / "out", "train")[0]["loss"]
    assert logits.size(-1) == 320 and loss == pytest.approx(expected, abs=1e-5)


def test_resume_does_not_need_the_source(hf_gpt2, sample_data, tmp_path):
    shutil.copytree(hf_gpt2[1], tmp_path / "source")
    flags = (
        tmp_path / "source",
        sample_data,
        tmp_path / "broken",
        "--max_steps=4",
        "--checkpoint_interval=2",
        "--dropout=0.1",
        "--reweight=linupper",
        "--eval_interval=2",
    )
    expect_ok(start_from(*flags))
    shutil.copytree(tmp_path / "broken", tmp_path / "whole")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "source")
    assert "resumed from" in expect_ok(start_from(*flags))
    for kind in ("train", "eval"):
        assert without_times(records(tmp_path / "broken", kind)) == without_times(
            records(tmp_path / "whole", kind)
        )
    a, b = (
        model_of(tmp_path / name / "checkpoints" / "step_00000004") for name in ("broken", "whole")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    # what a run started from is part of what it is
    expect_error(start_from(hf_gpt2[1], *flags[1:]), "another run", "init_from")


def test_a_run_of_ours_and_its_export_as_source(sample_data, tmp_path):
    expect_ok(run(sample_data, tmp_path / "first", "--max_steps=4"))
    expect_ok(export(tmp_path / "first"))
    last = records(tmp_path / "first", "eval")[-1]["mean_loss"]
    for source in ("first", "first/checkpoints/step_00000004", "first/hf"):
        expect_ok(
            start_from(
                tmp_path / source, sample_data, tmp_path / "out", "--max_steps=1", "--model=tiny"
            )
        )
        loss = records(tmp_path / "out", "eval")[0]["mean_loss"]
        if source == "first/hf":  # without the padding
            assert last - 0.5 < loss < last - 1e-4
        else:
            assert loss == pytest.approx(last, abs=1e-6)
        shutil.rmtree(tmp_path / "out")


def test_dry_run_reads_no_weights(hf_gpt2, sample_data, tmp_path):
    shutil.copytree(hf_gpt2[1], tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    text = expect_ok(start_from(tmp_path / "source", sample_data, tmp_path / "out", "--dry_run"))
    n = hf_gpt2[0].num_parameters() - 8 * 48  # 32 of 40 positions
    assert (
        f"from_source: {n:,} parameters, vocabulary 257" in text and not (tmp_path / "out").exists()
    )


def changed(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def without(tensor):
    def remove(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights[tensor]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return remove


def add_head(folder, factor):
    """A head in the file, `factor` times the embedding."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] * factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(reversed(letters))}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=t).save_pretrained(folder)


SOURCES = {  # case -> what is done to the folder of a GPT-2, flags, words of the error
    "no folder, no such name": (
        shutil.rmtree,
        [],
        ["neither a folder here", "huggingface.co", "model.safetensors"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), [], ["has no config.json", "only gpt2"]),
    "damaged config": (
        lambda f: (f / "config.json").write_text("{"),
        [],
        ["cannot be opened", "config.json"],
    ),
    "config of nothing": (lambda f: (f / "config.json").write_text("[]"), [], ["cannot be opened"]),
    "another architecture": (
        lambda f: changed(f, model_type="bloom"),
        [],
        ["type bloom", "only gpt2 or llama"],
    ),
    "another activation": (
        lambda f: changed(f, activation_function="relu"),
        [],
        ["activation_function relu"],
    ),
    "an untied head": (
        lambda f: changed(f, tie_word_embeddings=False),
        [],
        ["tie_word_embeddings False"],
    ),
    "a head of its own": (
        lambda f: add_head(f, 2.0),
        [],
        ["lm_head.weight", "wte.weight", "differ", "give a model"],
    ),
    "another width of the MLP": (lambda f: changed(f, n_inner=64), [], ["n_inner 64", "192"]),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        [],
        ["cannot be opened", "model.safetensors"],
    ),
    "damaged weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08" * 100),
        [],
        ["cannot be opened"],
    ),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-99]
        ),
        [],
        ["cannot be opened"],
    ),
    "a tensor missing": (
        without("transformer.h.1.ln_1.weight"),
        [],
        ["lack", "h.1.ln_1.weight", "restore"],
    ),
    "weights of another width": (lambda f: changed(f, n_embd=64), [], ["cannot be opened"]),
    "a vocabulary beyond the padding": (
        lambda f: changed(f, vocab_size=321),
        [],
        ["vocabulary 321", "bytes, 257"],
    ),
    "a vocabulary too small": (
        lambda f: changed(f, vocab_size=256),
        [],
        ["vocabulary 256", "bytes, 257"],
    ),
    "another tokenizer": (other_tokenizer, [], ["another tokenizer", "bytes, 257"]),
    "a damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        [],
        ["source: its tokenizer cannot be opened", "restore"],
    ),
    "another size": (
        None,
        ["--model=tiny"],
        ["--model tiny has 4 layers", "3 layers, 4 heads, width 48", "auto"],
    ),
    "too long": (
        None,
        ["--block_size=41"],
        ["--block_size 41", "40 positions", "--block_size 40 or less"],
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_wrong_sources(case, hf_gpt2, sample_data, tmp_path):
    spoil, flags, words = SOURCES[case]
    source = tmp_path / "source"
    shutil.copytree(hf_gpt2[1], source)
    if spoil:
        spoil(source)
    expect_error(start_from(source, sample_data, tmp_path / "out", "--max_steps=1", *flags), *words)
    assert not (tmp_path / "out").exists()


def test_wrong_runs_as_source(exported, sample_data, tmp_path):
    shutil.copytree(exported["gpt2"][0], tmp_path / "run")
    out, folder = tmp_path / "out", checkpoint.find_latest(tmp_path / "run")
    expect_error(
        start_from(tmp_path / "run", sample_data, out),
        "vocabulary 50304",
        "another tokenizer",
        "bytes, 257",
    )
    (folder / "state.json").write_text('{"step": 3}')
    expect_error(
        start_from(tmp_path / "run", sample_data, out), "state.json does not say the model's shape"
    )
    (folder / "state.json").write_text("{")
    expect_error(start_from(tmp_path / "run", sample_data, out), "state.json cannot be read")
    expect_error(
        start_from("gpt2", sample_data, out), "neither a folder here", "https://huggingface.co/gpt2"
    )
    assert not out.exists()


def test_wrong_exports(exported, tmp_path):
    run_dir, to = tmp_path / "run", tmp_path / "to"
    shutil.copytree(exported["bytes"][0], run_dir, ignore=shutil.ignore_patterns("hf"))
    state = checkpoint.find_latest(run_dir) / "state.json"
    good = state.read_text()

    def fails(*words, run_dir=run_dir, to=to):
        expect_error(export(run_dir, "--to", to), *words)
        assert not (tmp_path / "to").exists()

    fails("no checkpoint", run_dir=tmp_path / "absent")
    fails("no checkpoint", run_dir=tmp_path)
    fails("already there", to=run_dir)
    fails("already there", to=run_dir / "config.json")
    fails("Not a directory", to=run_dir / "config.json" / "hf")
    fails("cannot be written", to="/proc/hf")
    for text, words in (
        ("{", "cannot be read"),
        ('{"step": 3}', "'gpt'"),
        (good.replace(BYTES.sha256, "0" * 64), "tokenizer that is none of gpt2, bytes"),
    ):
        state.write_text(text)
        fails(words)
    state.write_text(good)
    (run_dir / "eval").mkdir()
    for name, text in (
        ("perplexity", '{"step": 3}'),
        ("perplexity", "["),
        ("fewshot", '{"step": 3, "tasks": 5}'),
    ):
        (run_dir / "eval" / f"{name}.json").write_text(text)
        fails(f"{name}.json")
        (run_dir / "eval" / f"{name}.json").unlink()
    (tmp_path / "to.tmp").mkdir()
    fails("to.tmp is in the way", "remove it")
    (tmp_path / "to.tmp").rmdir()
    (state.parent / "model.pt").write_bytes(b"PK")
    fails("model.pt is damaged")
    (run_dir / "config.json").write_text('{"model": "tiny"}')
    fails("config.json", "'data_dir'")
    (run_dir / "config.json").unlink()
    fails("config.json cannot be read")
    expect_error(command("scripts/export_hf.py"), "--run")
