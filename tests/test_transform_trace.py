"""``sparsify_``: what symbolic tracing would freeze or lose is noticed, and the module left alone."""

import copy
import gc
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ffn import FFN, Inline, OracleInline, assert_bit_equal, assert_close, check, data, oracle, outcome

from ao_act24 import Act24Warning, sparsify_, unsparsify_


def ffn(forward):
    """An ``FFN`` with another forward, in which ``self.dense(x)`` is what ``FFN`` itself computes."""
    return type("Custom", (FFN,), {"forward": forward, "dense": FFN.forward})()


def check_left_alone(model):
    with pytest.warns(Act24Warning, match="rewrote nothing"):
        sparsify_(model)
    assert "forward" not in vars(model)


def guesses(question):
    def forward(self, x):
        try:
            scale = question(x)
        except Exception:
            scale = 3.0
        return self.dense(x) * scale

    return forward


QUESTIONS = {
    "length": len,
    "number": lambda x: float(x.sum()),
    "comparison": lambda x: 2 if x.sum() > 0 else 1,
    "iteration": lambda x: sum(1 for _ in x),
    "membership": lambda x: 2 if 1.0 in x else 1,
    "exact type": lambda x: 2 if type(x) is torch.Tensor else 1,
    "parameter": lambda x: 2 if isinstance(x, torch.nn.Parameter) else 1,
    "field": lambda x: 2 if hasattr(x, "last_hidden_state") else 1,
    "attribute": lambda x: getattr(x, "scale", 2),
    "boolean attribute": lambda x: 2 if getattr(x, "is_nested", False) else 1,
    "size": lambda x: 2 if isinstance(x.shape[-1], int) else 1,
    "shape": lambda x: 2 if isinstance(x.shape, tuple) else 1,
    "result": lambda x: 2 if isinstance(x.chunk(2), tuple) else 1,
    "text": lambda x: 2 if str(x.dtype) == "torch.float32" else 1,
    "hash": lambda x: 2 if x.dtype in {torch.float32} else 1,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_only_a_real_tensor_answers(question):
    check_left_alone(ffn(guesses(QUESTIONS[question])))


@pytest.mark.parametrize("is_tensor", [torch.is_tensor, lambda x: isinstance(x, torch.Tensor)])
def test_a_question_what_an_argument_is(is_tensor):
    check_left_alone(ffn(lambda self, x: self.dense(x if is_tensor(x) else x[0])))
    check_left_alone(ffn(lambda self, x: self.dense(x if torch.is_tensor(x) else x[0])))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.pow(x, 2),
        lambda x: torch.where(x > 0, x, 0),
        lambda x: torch.where(x > 0, x * x, 0.0),
        lambda x: F.threshold(x, 0, 0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: torch.mul(2, x),
    ],
)
def test_functions_in_cpp_take_stand_ins(function):
    """Of arguments and of what was computed; as an activation they are among the spellings of ReLU²."""
    model, x = ffn(lambda self, x: self.dense(function(x))), data()
    want = outcome(oracle(model), x)
    assert len(sparsify_(model).rewritten) == 1
    assert_close(outcome(model, x), want)


@pytest.mark.parametrize(
    "relu2",
    [
        lambda h: torch.where(h > 0, h, 0).square(),
        lambda h: torch.where(h > 0, h * h, 0),
        lambda h: F.threshold(h, 0, 0).square(),
        lambda h: torch.pow(torch.relu(h), 2),
    ],
)
def test_spellings_of_relu2(relu2):
    model = Inline()
    model.relu2 = relu2
    assert len(sparsify_(model).rewritten) == 1
    x = data()
    assert_close(outcome(model, x), outcome(OracleInline(), x))


def test_a_buffer_is_read_at_each_call():
    model, x = ffn(lambda self, x: self.dense(x) * self.scale.exp()), data()
    model.register_buffer("scale", torch.zeros(()))
    check(model)
    model.scale.fill_(2.0)
    assert_close(outcome(model, x), outcome(oracle(model), x))


DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "torch in place": lambda: float(torch.empty(()).uniform_()),
    "python": random.random,
    "numpy": np.random.rand,
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_are_drawn_at_each_call_and_not_by_sparsify(draw):
    model, x = ffn(lambda self, x: self.dense(x) * DRAWS[draw]()), data()
    states = repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state(), sys.gettrace()
    check_left_alone(model)
    assert states[:2] == (repr(random.getstate()), repr(np.random.get_state())) and sys.gettrace() is states[3]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not torch.equal(model(x), model(x))


@torch.no_grad()
def without_gradient(function, x):
    return function(x)


def in_autocast(function, x):
    with torch.autocast("cpu", torch.bfloat16):
        return function(x)


def by_mode(function, x):
    return function(x) * (1 if torch.is_grad_enabled() else 3)


@pytest.mark.parametrize("helper", [without_gradient, in_autocast, by_mode])
def test_modes_in_a_helper(helper):
    check_left_alone(ffn(lambda self, x: helper(self.dense, x)))


calls = 0
record = {"calls": 0}
state = types.SimpleNamespace(calls=0)


def count_global():
    global calls
    calls += 1


def count_in_dict():
    record["calls"] += 1


def count_in_object():
    state.calls += 1


def counts_in_closure():
    count = 0

    def step():
        nonlocal count
        count += 1

    return step


@pytest.mark.parametrize("step", [count_global, count_in_dict, count_in_object, counts_in_closure()])
def test_a_helper_with_side_effects(step):
    check_left_alone(ffn(lambda self, x: [step(), self.dense(x)][1]))


def test_replica_for_data_parallel_uses_its_own_weights():
    model, x = FFN(), data()
    sparsify_(model)
    replica = model._replicate_for_data_parallel()
    for name in ("up", "down"):  # as nn.parallel.replicate does
        part = model.get_submodule(name)._replicate_for_data_parallel()
        part.weight, part.bias = (tensor.detach().clone() for tensor in model.get_submodule(name).parameters())
        setattr(replica, name, part)
    replica.down.weight.mul_(2), replica.down.bias.mul_(2)
    assert torch.equal(replica(x), 2 * model(x))
    unsparsify_(model)
    assert vars(model).keys() == vars(FFN()).keys()
    assert_bit_equal(outcome(copy.deepcopy(model), x), outcome(FFN(), x))


def test_a_garbage_collection_in_between_is_not_the_modules_doing():
    collections = 0

    def count(phase, info):
        nonlocal collections
        collections += 1
        counts[0] = collections

    counts, threshold = {}, gc.get_threshold()
    gc.callbacks.append(count)
    gc.set_threshold(1)
    try:
        report = sparsify_(FFN())
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(count)
    assert collections and len(report.rewritten) == 1 and gc.isenabled()
