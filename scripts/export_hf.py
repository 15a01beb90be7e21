"""A run as a folder that Hugging Face transformers and the evaluation harness open, without internet.

    python scripts/export_hf.py --run runs/124m_uniform_linupper_seed42 [--to DIR]

Writes model.safetensors, config.json, generation_config.json, the tokenizer's files and a model card, README.md, to
RUN/hf or DIR; all of it or nothing. --run may also be one of the run's checkpoints.

The rows that pad the vocabulary to a multiple of 64 are left out. The logits of all tokens stay what they were, but the
padding's part of the softmax goes to them, so each token's loss falls by -log(1 - that part). Measured on 448 windows
of real text, tiny models: with bytes as tokens (63 rows of padding, 2,000 steps) 3.0e-4 nats per token on average, 0.12
at the worst one; with GPT-2's vocabulary (47 rows, 300 steps) 4.9e-5 on average, 3.1e-4 at the worst one.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoint
import data
import tokenizer
from checkpoint import read_json
from configurator import Parser
from errors import UserError, run
from eval.models import find_run
from files import write_text
from manifest import data_hash, read_manifest
from model import import_transformers
from train import MAY_CHANGE, TrainConfig

EOT = "<|endoftext|>"
NEEDED = {"config.json": ("data_dir", "mixture", "reweight", "global_batch_size", "block_size", "max_steps"),
          "state.json": ("step", "gpt", "tokenizer_sha256")}
USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")  # this folder
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```

```
lm_eval --model hf --model_args pretrained=FOLDER --tasks lambada_openai
```
"""
CITATION = """## License and citation

MIT. The method: Sow et al., *Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining*,
ICLR 2025, [arXiv:2502.06733](https://arxiv.org/abs/2502.06733).
"""


def write_tokenizer(name: str, block_size: int, folder: Path) -> None:
    """The files from which AutoTokenizer makes a tokenizer with the ids of tokenizer.load(name).

    "bytes" is GPT-2's byte-level BPE without a merge: each byte stays a token, its id the byte's value.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # comes with transformers
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if name == "gpt2":
        for source, target in zip(tokenizer.gpt2_files(), (merges, vocab), strict=True):
            shutil.copyfile(source, target)
    else:  # GPT-2 writes a byte as the character of that number, or where that has no shape, as one from 256 on
        shown = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
        hidden = [b for b in range(256) if b not in shown]
        ids = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)} | {EOT: 256}
        vocab.write_text(json.dumps(ids))
        merges.write_text("#version: 0.2\n")
    bpe = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([EOT])
    bpe.save(str(folder / "tokenizer.json"))
    # split_special_tokens: the text "<|endoftext|>" in a document is text, as it was in training
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": EOT, "eos_token": EOT, "unk_token": EOT,
                "add_prefix_space": False, "split_special_tokens": True, "clean_up_tokenization_spaces": False,
                "model_max_length": block_size}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def training_data(config: dict, state: dict) -> str:
    """Where the tokens came from, as far as the data folder is still there to say so."""
    fingerprint = state.get("identity", {}).get("data")
    try:
        manifest = read_manifest(config["data_dir"])
    except UserError:
        manifest = None
    if not manifest or data_hash(manifest) != fingerprint:
        return f"a data folder that was not there when this card was written (fingerprint {fingerprint})"
    source = manifest["source"]
    what = {"sample": source.get("note"), "hub": f"the hub's {source.get('dataset')}",
            "files": f"the files of {', '.join(Path(p).name for p in source.get('input', []))}"}[source["source"]]
    return f"{what} (fingerprint {fingerprint})"


def mixture(name: str) -> str:
    """The probability of each domain."""
    weights = data.MIXTURES.get(name)
    if weights is None:
        return f"{name} (in proportion to each domain's tokens)" if name in data.MIXTURES else name
    return f"{name} ({', '.join(f'{d} {p / sum(weights.values()):.3f}' for d, p in weights.items())})"


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [head, ("---", *["--:"] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "none"  # a task may have no standard error


def results(run_dir: Path, step: int) -> str:
    """The tables of RUN/eval/perplexity.json and fewshot.json; "not evaluated" where there is none of this step."""
    def perplexity(record: dict) -> str:
        rows = [(name, *(number(d[key]) for key in ("loss", "ppl", "bits_per_byte"))) for name, d in
                record["domains"].items()]
        return (f"Validation windows {record['val_hash']}, none weighted.\n\n" +
                table(("domain", "loss (nats per token)", "perplexity", "bits per byte"), rows) +
                f"\n\nAverage loss over the domains {record['mean_loss']:.4f}, worst domain {record['worst_domain']}.")

    def fewshot(record: dict) -> str:
        rows = [(name, t["metric"].split(",")[0], number(t["score"]), number(t["stderr"]),
                 t["requests"], t["truncated"]) for name, t in record["tasks"].items()]
        return (f"{record['num_fewshot']} examples in the prompt.\n\n" +
                table(("task", "metric", "score", "standard error", "requests", "cut on the left"), rows))

    parts = []
    for name, title, text in (("perplexity", "Perplexity", perplexity), ("fewshot", "Few-shot tasks", fewshot)):
        path = run_dir / "eval" / f"{name}.json"
        try:
            record = read_json(path) if path.is_file() else {}
            here = text(record) if record.get("step") == step else "not evaluated"
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not what eval/{name}.py writes; run: python eval/{name}.py --run {run_dir}"
                            ) from None
        parts.append(f"### {title}\n\n{here}\n")
    return "\n".join(parts)


def card(run_dir: Path, config: dict, state: dict, tokens: tokenizer.Tokenizer, parameters: int) -> str:
    """The model card: what the model is, how it was trained, what it scored, how to load it."""
    gpt, step = state["gpt"], state["step"]
    seen = step * config["global_batch_size"] * config["block_size"]
    settings = [(f"`{key}`", config[key]) for key in TrainConfig.__dataclass_fields__
                if key in config and key not in MAY_CHANGE - {"max_steps"}]
    padding = gpt["vocab_size"] - tokens.n_vocab
    start = f"the weights of {Path(config['init_from']).name}" if config.get("init_from") else "random weights"
    dropped = f"""
The {padding} rows that padded the vocabulary in training are left out. The logits of all tokens are what they were, but
the padding's small part of the softmax goes to them, so a loss computed with this folder is slightly below the same
loss in training or with nanoReweight's own checkpoint.
""" if padding else ""
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- pretraining
- sample-reweighting
---

# {run_dir.resolve().name}

A GPT-2 ({gpt["n_layer"]} layers, {gpt["n_head"]} heads, width {gpt["n_embd"]}, {gpt["block_size"]} positions,
{parameters:,} parameters) trained with nanoReweight from {start} for {step:,} of {config["max_steps"]:,} steps.
It is a research model that continues text; nothing was done to make it follow instructions or refuse them.

{USE}
Tokenizer: {tokens.name}, {tokens.n_vocab:,} tokens. Documents ended with token {tokens.eot_token}, `{EOT}`; the
tokenizer takes these characters within a text for plain text, as in training.

## Training

- Strategy: {config["reweight"]}
- Tokens: {seen:,} ({step:,} steps x {config["global_batch_size"]} sequences x {config["block_size"]})
- Data: {training_data(config, state)}
- Mixture: {mixture(config["mixture"])}
- Code: git commit {config.get("git_commit", "unknown")}, {', '.join(f'{k} {v}' for k, v in
                                                                   config.get("versions", {}).items())}

{table(("setting", "value"), settings)}

## Results

{results(run_dir, step)}{dropped}
{CITATION}"""


def write_folder(to: Path, write: Callable[[Path], None]) -> None:
    """Call write(folder) on a temporary folder and give it the name `to`: whole or absent."""
    from safetensors import SafetensorError  # only where transformers is installed
    to = to.resolve()
    temporary = to.with_name(f"{to.name}.tmp")
    try:
        if to.exists() and not (to.is_dir() and not any(to.iterdir())):
            raise UserError(f"--to {to} is already there; remove it, or give a folder that is new or empty")
        if temporary.exists():
            raise UserError(f"{temporary} is in the way; an export that was broken off leaves it: remove it")
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            os.sync()
            os.replace(temporary, to)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--to {to} cannot be written ({reason}); give another folder") from None


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder, or one of its checkpoints")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to write, new or empty (default: RUN/hf)")
    args = parser.parse_args()
    import_transformers()
    run_dir, folder = find_run(args.run)
    config, state = read_json(run_dir / "config.json"), read_json(folder / "state.json")
    for (file, keys), content in zip(NEEDED.items(), (config, state), strict=True):
        if lacking := [key for key in keys if key not in content]:
            raise UserError(f"{file} of {args.run} has no {lacking[0]!r}; restore it")
    tokens, to = tokenizer.find(state["tokenizer_sha256"]), args.to or run_dir / "hf"

    def write(target: Path) -> None:
        model = checkpoint.load_model(folder).to_pretrained(tokens.n_vocab, tokens.eot_token)
        write_tokenizer(tokens.name, model.config.n_positions, target)
        write_text(target / "README.md", card(run_dir, config, state, tokens, model.num_parameters()))
        model.save_pretrained(target, max_shard_size="1TB")  # one file
        shutil.copymode(target / "config.json", target / "model.safetensors")  # the writer lets nobody else read it

    write_folder(to, write)
    print(f"step {state['step']:,} of {run_dir} as {to}")


if __name__ == "__main__":
    run(main)
