"""``sparsify_`` decides once; what changes in a model afterwards must not be computed wrongly."""

import copy
import warnings

import pytest
import torch
from ffn import FFN, D, H, assert_bit_equal, assert_close, check, data, oracle, outcome
from oracle import relative_error
from torch import nn

from ao_act24 import Act24Warning, sparsify_, unsparsify_


def test_dropout_switches_with_the_mode():
    model, plain, x = FFN(p=0.5).eval(), FFN(p=0.5), data()
    assert len(sparsify_(model).rewritten) == 1
    want = outcome(oracle(model), x)
    assert relative_error(outcome(plain.eval(), x)["out"], want["out"]) > 0.01
    for _ in range(2):
        assert_close(outcome(model.eval(), x), want)
        torch.manual_seed(5)
        got = outcome(model.train(), x)
        torch.manual_seed(5)
        assert_bit_equal(got, outcome(plain.train(), x))  # where dropout is active, the original runs


def test_dropout_in_training_is_reported():
    model, x = FFN(p=0.5).train(), data()
    report = sparsify_(model)  # no warning: in eval mode it runs in 2:4
    assert "dropout" in report.dense[0].reason and "eval mode" in report.dense[0].reason
    assert_close(outcome(model.eval(), x), outcome(oracle(FFN(p=0.5).eval()), x))


def test_monte_carlo_dropout():
    """Dropout in training mode inside a module in eval mode: the original runs, and says so once."""
    model, x = FFN(p=0.5).eval(), data()
    sparsify_(model)
    model.dropout.train()
    plain = FFN(p=0.5).eval()
    plain.dropout.train()
    torch.manual_seed(5)
    with pytest.warns(Act24Warning, match="dropout is not in the training mode"):
        got = outcome(model, x)
    torch.manual_seed(5)
    assert_bit_equal(got, outcome(plain, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    model.dropout.eval()
    assert_close(outcome(model, x), outcome(oracle(FFN().eval()), x))


def test_dropout_rate_changed():
    model, x = FFN(p=0.0).train(), data()
    sparsify_(model)
    model.dropout.p = 0.5
    plain = FFN(p=0.5).train()
    torch.manual_seed(5)
    with pytest.warns(Act24Warning, match="drops with p=0.5"):
        got = outcome(model, x)
    torch.manual_seed(5)
    assert_bit_equal(got, outcome(plain, x))


def test_dropout_that_is_never_called():
    model, x = FFN(p=0.5).train(), data()
    model.dropout, model.unused = nn.Identity(), nn.Dropout(0.5)
    sparsify_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Act24Warning)
        assert_close(outcome(model, x), outcome(oracle(model), x))


class LoRA(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(inputs, outputs), nn.Linear(inputs, 2), nn.Linear(2, outputs)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("wrapped", [("up",), ("down",), ("up", "down")])
def test_lora_adapters_stay_dense_with_a_reason(wrapped):
    model, x = FFN(), data()
    for name in wrapped:
        linear = getattr(model, name)
        setattr(model, name, LoRA(linear.in_features, linear.out_features))
    want = outcome(model, x)
    with pytest.warns(Act24Warning, match="merge that into the base weight first"):
        (verdict,) = sparsify_(model)
    assert not verdict.rewritten and "a LoRA and no plain linear layer" in verdict.reason
    assert_bit_equal(outcome(model, x), want)


def test_hook_on_up_fires():
    model, seen = FFN(), []
    model.up.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    check(model)
    assert len(seen) == 3 and torch.equal(seen[0], seen[-1])  # oracle, dense, 2:4


def test_hook_on_up_after_sparsify():
    model, x, seen = FFN(), data(), []
    sparsify_(model)
    model.up.register_forward_hook(lambda module, args, out: seen.append(out) or out + 1)
    assert_close(outcome(model, x), outcome(oracle(model), x))
    assert len(seen) == 2


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "full backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "full backward pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("after", [True, False], ids=["hooked after", "hooked before"])
@pytest.mark.parametrize("name", ["activation", "dropout", "down"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hook_on_what_is_not_called_any_more(hook, name, after):
    """The hook fires, so the original runs."""
    model, x, seen = FFN(), data(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        if not after:
            HOOKS[hook](model.get_submodule(name), seen)
        sparsify_(model)
        if after:
            HOOKS[hook](model.get_submodule(name), seen)
        got = outcome(model, x)
    assert len(seen) == 1
    assert_bit_equal(got, outcome(FFN(), x))


def test_hook_on_the_activation_warns():
    model = FFN()
    sparsify_(model)
    model.activation.register_forward_hook(lambda *_: None)
    with pytest.warns(Act24Warning, match="activation has a hook: FFN runs dense"):
        model(data())


def patch_forward(module):
    original = module.forward
    module.forward = lambda *args: original(*args) + 1


@pytest.mark.parametrize("after", [True, False], ids=["patched after", "patched before"])
@pytest.mark.parametrize("name", ["up", "activation", "dropout", "down"])
def test_forward_of_a_part_is_patched(name, after):
    """As libraries do that load weights on demand: the patched forward must run."""
    model, x = FFN(), data()
    wanted = [FFN(), oracle(model)] if name == "up" else [FFN()]  # behind a patched up projection 2:4 is possible
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        if not after:
            patch_forward(model.get_submodule(name))
        sparsify_(model)
        if after:
            patch_forward(model.get_submodule(name))
        got = outcome(model, x)
    for want in wanted:
        patch_forward(want.get_submodule(name))
    assert min(relative_error(got["out"], outcome(want, x)["out"]) for want in wanted) <= 1e-5


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


REPLACEMENTS = {
    "other weights": lambda: nn.Linear(H, D),
    "without bias": lambda: nn.Linear(H, D, bias=False),
    "wider": lambda: nn.Linear(H, 3 * D),
    "subclass": lambda: Scaled(H, D),
    "sequence": lambda: nn.Sequential(nn.Linear(H, 4), nn.Linear(4, D)),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_down_replaced(replacement):
    """2:4 where it is a plain linear layer, dense where it is not."""
    model, x = FFN(), data()
    sparsify_(model)
    model.down = REPLACEMENTS[replacement]()
    plain = copy.deepcopy(model)
    unsparsify_(plain)
    sparse = type(model.down) is nn.Linear
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = outcome(model, x)
    assert_close(got, outcome(oracle(model) if sparse else plain, x))
    assert [str(w.message) for w in caught] == (
        [] if sparse else [f"down was replaced after sparsify_, by a {type(model.down).__name__}: FFN runs dense"]
    )


def test_down_gets_a_bias():
    """2:4 or dense, but with the bias."""
    model, x = FFN(bias=False), data()
    sparsify_(model)
    model.down = nn.Linear(H, D, bias=True)
    model.down.bias.data.fill_(10.0)
    assert relative_error(model(x), oracle(model)(x)) < 0.1


def test_up_replaced():
    model, x = FFN(), data()
    sparsify_(model)
    model.up = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, H))
    assert_close(outcome(model, x), outcome(oracle(model), x))


def test_hidden_size_changed():
    """To one that 2:4 cannot do: dense."""
    model, x = FFN(), data()
    sparsify_(model)
    model.up, model.down = nn.Linear(D, 18), nn.Linear(18, D)
    plain = FFN()
    plain.up, plain.down = model.up, model.down
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Act24Warning)
        assert torch.equal(model(x), plain(x))


def test_activation_replaced():
    model, x = FFN(), data()
    sparsify_(model)
    model.activation = nn.GELU()
    with pytest.warns(Act24Warning, match="activation was replaced after sparsify_, by a GELU"):
        got = outcome(model, x)
    assert_bit_equal(got, outcome(FFN(nn.GELU()), x))


def test_quantised_afterwards():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, plain, x = FFN(), FFN(), data(grad=False)
    sparsify_(model)
    for m in (model, plain):
        quantize_(m.down, Int8WeightOnlyConfig())
    with pytest.warns(Act24Warning, match=r"down\.weight became a"):
        assert torch.equal(model(x), plain(x))
