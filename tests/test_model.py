"""Our GPT-2 against transformers', on the same random weights."""

from dataclasses import replace

import pytest
import torch

from model import GPT, SIZES, GPTConfig

SMALL = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=48, vocab_size=211)
PARAMETERS = {"tiny": 7_357_312, "124m": 124_439_808, "210m": 209_494_272, "355m": 354_823_168, "684m": 684_181_200,
              "774m": 774_030_080, "1.5b": 1_557_611_200}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_positions=48, n_embd=64, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():  # also biases and LayerNorm, which start as constants
        torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


def test_logits_and_losses_equal_transformers(reference):
    theirs, folder = reference
    ours = GPT.from_pretrained(str(folder)).eval()
    assert ours.config == SMALL
    idx = torch.randint(0, 211, (5, 49), generator=torch.Generator().manual_seed(1))
    x, y = idx[:, :-1], idx[:, 1:]
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)
        losses = torch.nn.functional.cross_entropy(expected.transpose(1, 2), y, reduction="none")
        torch.testing.assert_close(ours(x, y), losses, atol=1e-4, rtol=0)
        assert ours(x, y).shape == (5, 48) and ours(x, y).dtype == torch.float32


def test_gradients_equal_transformers(reference):
    theirs, folder = reference
    ours = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(0, 211, (2, 20), generator=torch.Generator().manual_seed(2))
    theirs.zero_grad()
    theirs(idx, labels=idx).loss.backward()
    ours(idx[:, :-1], idx[:, 1:]).mean().backward()
    expected = theirs.transformer.h[1].attn.c_attn.weight.grad.T
    torch.testing.assert_close(ours.h[1].attn.c_attn.weight.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    with torch.device("meta"):
        assert GPT(SIZES[name]).n_parameters() == PARAMETERS[name]


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, n_embd=128, vocab_size=1000))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert (model.h[0].ln_1.weight == 1).all() and (model.h[0].mlp.c_fc.bias == 0).all()


def test_a_token_sees_only_the_past():
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    a = torch.randint(0, 211, (1, 20))
    b = a.clone()
    b[0, 12:] = (b[0, 12:] + 1) % 211
    torch.testing.assert_close(model(a)[:, :12], model(b)[:, :12])
    assert not torch.allclose(model(a)[:, 12:], model(b)[:, 12:])


def test_dropout_works_in_training_only():
    torch.manual_seed(0)
    model = GPT(replace(SMALL, dropout=0.5))
    x = torch.randint(0, 211, (1, 20))
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
