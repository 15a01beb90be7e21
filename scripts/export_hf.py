"""Export a run to a folder that transformers and the evaluation harness open without internet.

    python scripts/export_hf.py --run runs/124m_uniform_linupper_seed42 [--to DIR]

Writes model.safetensors (above 10 GB in parts, with an index), config.json, generation_config.json,
the tokenizer's files and a model card, README.md, to RUN/hf or DIR; all of it or nothing. --run may
also be one of the run's checkpoints.

The rows that pad the vocabulary to a multiple of 64 are left out. The logits of all tokens stay
what they were, but the padding's part of the softmax goes to them, so each token's loss falls by
-log(1 - that part). Measured on 448 windows of real text, tiny models: with bytes as tokens (63
rows of padding, 2,000 steps) 3.0e-4 nats per token on average, 0.12 at the worst one; with GPT-2's
vocabulary (47 rows, 300 steps) 4.9e-5 on average, 3.1e-4 at the worst one.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the modules of the root are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from cli import Parser, UserError, run
from corpus import tokenizer
from corpus.hf_tokenizer import byte_characters
from corpus.manifest import data_hash, read_manifest
from eval.models import find_run
from families import FAMILIES
from files import write_text
from hf import import_transformers
from recipe import EXECUTION_KEYS, TrainConfig
from runtime import checkpoint
from runtime.checkpoint import read_json

EOT = "<|endoftext|>"
# What the card needs from a run's config.json and a checkpoint's state.json.
CONFIG_KEYS = (
    "data_dir",
    "mixture",
    "reweight",
    "global_batch_size",
    "block_size",
    "max_steps",
)
STATE_KEYS = ("step", "gpt", "tokenizer_sha256")
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
PADDING = """
The {} rows that padded the vocabulary in training are left out. The logits of all tokens are what
they were, but the padding's small part of the softmax goes to them, so a loss computed with this
folder is slightly below the same loss in training or with nanoReweight's own checkpoint.
"""
CITATION = """## License and citation

MIT. The method: Sow et al., *Dynamic Loss-Based Sample Reweighting for Improved Large Language
Model Pretraining*, ICLR 2025, [arXiv:2502.06733](https://arxiv.org/abs/2502.06733).
"""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, help="run folder, or one of its checkpoints")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="folder to write, new or empty (default: RUN/hf)"
    )
    args = parser.parse_args()
    import_transformers()
    run_dir, folder = find_run(args.run)
    config = read_json(run_dir / "config.json")
    state = read_json(folder / "state.json")
    check_keys(args.run, "config.json", config, CONFIG_KEYS)
    check_keys(args.run, "state.json", state, STATE_KEYS)
    tokens = tokenizer.find(state["tokenizer_sha256"], run_dir, config["data_dir"])
    to = args.to or run_dir / "hf"

    def write(target: Path) -> None:
        model = checkpoint.load_model(folder).to_pretrained(tokens.n_vocab, tokens.eot_token)
        write_tokenizer(tokens, state["gpt"]["block_size"], target)
        text = card(run_dir, config, state, tokens, model.num_parameters())
        write_text(target / "README.md", text)
        model.save_pretrained(target, max_shard_size="10GB")
        for path in target.glob("*.safetensors"):  # their writer lets nobody else read them
            shutil.copymode(target / "config.json", path)

    write_folder(to, write)
    print(f"step {state['step']:,} of {run_dir} as {to}")


def check_keys(run_flag: str, file: str, content: dict, keys: tuple[str, ...]) -> None:
    for key in keys:
        if key not in content:
            raise UserError(f"{file} of {run_flag} has no {key!r}; restore it")


def write_folder(to: Path, write: Callable[[Path], None]) -> None:
    """Call write(folder) on a temporary folder and give it the name `to`: whole or absent."""
    from safetensors import SafetensorError  # only where transformers is installed

    to = to.resolve()
    temporary = to.with_name(f"{to.name}.tmp")
    try:
        is_empty_folder = to.is_dir() and not any(to.iterdir())
        if to.exists() and not is_empty_folder:
            raise UserError(
                f"--to {to} is already there; remove it, or give a folder that is new or empty"
            )
        if temporary.exists():
            raise UserError(
                f"{temporary} is in the way; an export that was broken off leaves it: remove it"
            )
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


# The tokenizer


def write_tokenizer(tokens: tokenizer.Tokenizer, block_size: int, folder: Path) -> None:
    """The files from which AutoTokenizer makes a tokenizer with the same ids."""
    if tokens.file:
        settings = write_file(tokens.file, folder)
    else:
        settings = write_byte_level(tokens.name, folder)
    settings |= {
        # The text "<|endoftext|>" in a document is text, as it was in training.
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_file(file: tokenizer.TokenizerFile, folder: Path) -> dict:
    """tokenizer.json without what would add tokens to a text: no document began with one.

    Returns what tokenizer_config.json has to say of it.
    """
    (folder / "tokenizer.json").write_text(file.spec_to_run())
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": file.eot}


def write_byte_level(name: str, folder: Path) -> dict:
    """GPT-2's own files, and tokenizer.json; returns what tokenizer_config.json has to say.

    "bytes" is GPT-2's byte-level BPE without a merge: each byte stays a token, its id the byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # comes with transformers

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if name == "gpt2":
        gpt2_merges, gpt2_vocab = tokenizer.gpt2_files()
        shutil.copyfile(gpt2_merges, merges)
        shutil.copyfile(gpt2_vocab, vocab)
    else:
        vocab.write_text(json.dumps(byte_ids()))
        merges.write_text("#version: 0.2\n")
    bpe = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([EOT])
    bpe.save(str(folder / "tokenizer.json"))
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "add_prefix_space": False,
    }


def byte_ids() -> dict[str, int]:
    """The id of each byte, under the character that GPT-2 writes for it, and of EOT."""
    ids = {character: byte for byte, character in byte_characters().items()}
    ids[EOT] = 256
    return ids


# The model card


def card(
    run_dir: Path, config: dict, state: dict, tokens: tokenizer.Tokenizer, parameters: int
) -> str:
    """The model card: what the model is, how it was trained, what it scored, how to load it."""
    gpt, step, max_steps = state["gpt"], state["step"], config["max_steps"]
    family = gpt.get("family", "gpt2")
    _, _, title = FAMILIES[family]
    positions, padding = gpt["block_size"], gpt["vocab_size"] - tokens.n_vocab
    batch, length = config["global_batch_size"], config["block_size"]
    end_of_text = tokens.token_bytes(tokens.eot_token).decode()
    source = config.get("init_from")
    start = f"the weights of {Path(source).name}" if source else "random weights"
    versions = [f"{name} {version}" for name, version in config.get("versions", {}).items()]
    # Only what says what was trained; max_steps is part of the learning rate's schedule.
    left_out = EXECUTION_KEYS | {"data_dir"}
    settings = []
    for field in fields(TrainConfig):
        if field.name in config and field.name not in left_out:
            settings.append((f"`{field.name}`", config[field.name]))
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags:
- {family}
- pretraining
- sample-reweighting
---

# {run_dir.resolve().name}

A {title} ({gpt["n_layer"]} layers, {gpt["n_head"]} heads, width {gpt["n_embd"]},
{positions} positions, {parameters:,} parameters) trained with nanoReweight from {start}
for {step:,} of {max_steps:,} steps. It is a research model that continues text; nothing was done to
make it follow instructions or refuse them.

{USE}
Tokenizer: {tokens.name}, {tokens.n_vocab:,} tokens. Documents ended with token {tokens.eot_token},
`{end_of_text}`; the tokenizer takes these characters within a text for plain text, as in training.

## Training

- Strategy: {config["reweight"]}
- Tokens: {step * batch * length:,} ({step:,} steps x {batch} sequences x {length})
- Data: {training_data(config, state)}
- Mixture: {mixture(config["mixture"])}
- Code: git commit {config.get("git_commit", "unknown")}, {", ".join(versions)}

{table(("setting", "value"), settings)}

## Results

{results(run_dir, step)}{PADDING.format(padding) if padding else ""}
{CITATION}"""


def training_data(config: dict, state: dict) -> str:
    """Where the tokens came from, as far as the data folder can still be read."""
    fingerprint = state.get("identity", {}).get("data")
    try:
        manifest = read_manifest(config["data_dir"])
    except UserError:
        manifest = None
    if not manifest or data_hash(manifest) != fingerprint:
        return (
            "a data folder that was not there when this card was written "
            f"(fingerprint {fingerprint})"
        )
    source = manifest["source"]
    files = [Path(path).name for path in source.get("input", [])]
    origin = {
        "sample": source.get("note"),
        "hub": f"the hub's {source.get('dataset')}",
        "files": f"the files of {', '.join(files)}",
    }
    return f"{origin[source['source']]} (fingerprint {fingerprint})"


def mixture(name: str) -> str:
    """A mixture's name and the probability of each domain."""
    try:
        weights = data.probabilities(name)
    except UserError:  # a mixture that a fork has had
        return name
    if weights is None:
        return name
    shares = [f"{domain} {weight:.3f}" for domain, weight in weights.items()]
    return f"{name} ({', '.join(shares)})"


def results(run_dir: Path, step: int) -> str:
    """The tables of RUN/eval/perplexity.json and fewshot.json, where they are of this step."""
    perplexity = result(run_dir, step, "perplexity", perplexity_table)
    fewshot = result(run_dir, step, "fewshot", fewshot_table)
    return f"### Perplexity\n\n{perplexity}\n\n### Few-shot tasks\n\n{fewshot}\n"


def result(run_dir: Path, step: int, name: str, to_text: Callable[[dict], str]) -> str:
    path = run_dir / "eval" / f"{name}.json"
    if not path.is_file():
        return "not evaluated"
    try:
        record = read_json(path)
        return to_text(record) if record.get("step") == step else "not evaluated"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not what eval/{name}.py writes; run: python eval/{name}.py --run {run_dir}"
        ) from None


def perplexity_table(record: dict) -> str:
    rows = []
    for name, domain in record["domains"].items():
        loss, ppl, bits = domain["loss"], domain["ppl"], domain["bits_per_byte"]
        rows.append((name, number(loss), number(ppl), number(bits)))
    head = ("domain", "loss (nats per token)", "perplexity", "bits per byte")
    return (
        f"Validation windows {record['val_hash']}, none weighted.\n\n{table(head, rows)}\n\n"
        f"Average loss over the domains {record['mean_loss']:.4f}, "
        f"worst domain {record['worst_domain']}."
    )


def fewshot_table(record: dict) -> str:
    rows = []
    for name, task in record["tasks"].items():
        metric = task["metric"].split(",")[0]
        scores = (number(task["score"]), number(task["stderr"]))
        rows.append((name, metric, *scores, task["requests"], task["truncated"]))
    head = ("task", "metric", "score", "standard error", "requests", "cut on the left")
    return f"{record['num_fewshot']} examples in the prompt.\n\n{table(head, rows)}"


def number(value: float | None) -> str:
    """Four digits; "none" for what a task does not have, such as a standard error."""
    return f"{value:.4f}" if isinstance(value, int | float) else "none"


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ("---", *["--:"] * (len(head) - 1))
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
