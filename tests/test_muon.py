"""--optimizer muon: steps, skipped steps, resume, export; layouts are in test_distributed.py."""

import json
import math
import shutil

import pytest
import torch
from conftest import command, expect_error, expect_ok
from test_step import LEARNING_RATES, SHAPE, STEPS, G, batch_of, new_trainer, trained
from test_train import assert_same_model, records, run, without_times
from torch.utils._pytree import tree_leaves

from model import GPT
from runtime import checkpoint

MATRICES = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # of a block


def test_its_steps_are_those_of_torchs_muon_and_adamw():
    """On the clipped gradient of the whole batch; weight decay is on matrices only."""
    settings = {"optimizer": "muon", "micro_batch_size": G, "reweight": "uniform"}
    start, rows = trained(**settings)
    model = GPT(SHAPE)
    for parameter, value in zip(model.parameters(), start, strict=True):
        parameter.data.copy_(value)
    named = dict(model.named_parameters())
    by_muon = [p for name, p in named.items() if name.endswith(MATRICES)]
    assert len(by_muon) == 4 * SHAPE.n_layer
    muon = torch.optim.Muon(
        by_muon,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        adjust_lr_fn="match_rms_adamw",
    )
    tables = {"params": [named["wte.weight"], named["wpe.weight"]], "weight_decay": 0.1}
    vectors = {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([tables, vectors], betas=(0.8, 0.97), fused=True)
    for step in range(STEPS):
        x, y, *_ = batch_of(step)
        model.zero_grad()
        model(x, y).mean().backward()
        # Divided as in a step: Muon's bfloat16 products would make much of another rounding.
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert norm > 0.7
        for parameter in model.parameters():
            parameter.grad /= norm / 0.7
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATES[step]
            optimizer.step()
        expected = torch.cat([p.detach().flatten().double() for p in model.parameters()])
        torch.testing.assert_close(rows[step], expected, atol=1e-6, rtol=0)


def step_with_nan(trainer) -> None:
    """A step on a batch whose last loss is not finite."""
    forward = trainer.raw.forward
    addend = torch.tensor([0.0, 0.0, 0.0, math.nan])[:, None]
    trainer.raw.forward = lambda *args: forward(*args) + addend
    assert not trainer.step(5, batch_of(5)).taken
    trainer.raw.forward = forward


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_step_leaves_no_trace(steps_before):
    """In parameters, momentum, moments and step counts; also where it is the first one."""
    plain, skipping = new_trainer(optimizer="muon"), new_trainer(optimizer="muon")
    for step in range(4):
        if step == steps_before:
            step_with_nan(skipping)
        plain.step(step, batch_of(step))
        skipping.step(step, batch_of(step))
    for expected, got in zip(
        tree_leaves(plain.state_dict()), tree_leaves(skipping.state_dict()), strict=True
    ):
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


FLAGS = ("--max_steps=8", "--checkpoint_interval=4", "--reweight=linupper", "--dropout=0.1")
MUON = (*FLAGS, "--optimizer=muon")


@pytest.fixture(scope="module")
def muon_run(sample_data, tmp_path_factory):
    """Eight steps on two ranks."""
    out = tmp_path_factory.mktemp("muon") / "run"
    text = expect_ok(run(sample_data, out, *MUON, ranks=2))
    assert "Muon for the blocks' matrices" in text and "Muon 0.01" in text  # its memory, in GB
    return out


def test_a_checkpoint_has_the_state_of_both_by_name(muon_run):
    folder = checkpoint.find_latest(muon_run)
    ((weights, optimizer),) = checkpoint.read_parts(folder, checkpoint.read_shape(folder))
    assert optimizer["state"].keys() == weights.keys()
    for name, state in optimizer["state"].items():
        of_muon = name.endswith(MATRICES)
        assert set(state) == ({"momentum_buffer"} if of_muon else {"step", "exp_avg", "exp_avg_sq"})
        moment = state["momentum_buffer" if of_muon else "exp_avg"]
        assert moment.shape == weights[name].shape and moment.any()


def test_resume_equals_the_unbroken_run_bit_for_bit(muon_run, sample_data, tmp_path):
    out = tmp_path / "broken"
    shutil.copytree(muon_run, out)
    shutil.rmtree(checkpoint.checkpoint_folder(out, 8))
    expect_error(run(sample_data, out, *FLAGS), "optimizer muon there, adamw here")
    assert "resumed from" in expect_ok(run(sample_data, out, *MUON, ranks=2))
    assert without_times(records(out, "train")) == without_times(records(muon_run, "train"))
    assert_same_model(out, muon_run, 8)
    folders = map(checkpoint.find_latest, (out, muon_run))
    got, expected = (checkpoint.load_tensors(folder, "optimizer.pt") for folder in folders)
    torch.testing.assert_close(got["state"], expected["state"], atol=0, rtol=0)


def test_a_run_from_before_the_key_was_one_of_adamw(sample_data, tmp_path):
    out = tmp_path / "run"
    expect_ok(run(sample_data, out, *FLAGS, "--max_steps=4"))
    path = checkpoint.checkpoint_folder(out, 4) / "state.json"
    state = checkpoint.read_json(path)
    assert state["identity"].pop("optimizer") == "adamw"
    path.write_text(json.dumps(state))
    expect_error(run(sample_data, out, *MUON), "optimizer adamw there, muon here")
    assert "resumed from" in expect_ok(run(sample_data, out, *FLAGS))


def test_a_run_can_be_exported(muon_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    to = tmp_path / "hf"
    expect_ok(command("scripts/export_hf.py", "--run", muon_run, "--to", to))
    assert "| `optimizer` | muon |" in (to / "README.md").read_text()
    ours = checkpoint.load_model(checkpoint.find_latest(muon_run)).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    x = torch.arange(32)[None]
    torch.testing.assert_close(theirs(x).logits, ours(x)[..., :257], atol=1e-5, rtol=0)
