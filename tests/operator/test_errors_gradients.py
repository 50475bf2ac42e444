"""Gradients: a backward pass is refused, a forward pass is not."""

from __future__ import annotations

import pytest
import torch
from helpers.errors import BATCH, HEAD_DIM, MAX_KV_LEN, NUM_KV_HEADS, NUM_QO_HEADS, assert_refused, call, qkv
from helpers.inputs import make_qkv

import santa

NO_BACKWARD = "santa: decode has no backward pass .* torch.no_grad"


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_backward_is_refused_and_forward_is_not(operator, device, name):
    """The forward pass of tensors that require gradients works and gives the same bits; only a backward pass
    raises."""
    q, k, v = make_qkv(BATCH, NUM_QO_HEADS, NUM_KV_HEADS, MAX_KV_LEN, HEAD_DIM, dtype=torch.float16, device=device)
    arguments = {"q": q, "k": k, "v": v, "num_samples": 16, "min_sampled_len": 0}
    expected = call(operator, arguments)
    assert not any(x.requires_grad for x in expected)
    arguments[name] = arguments[name].clone().requires_grad_()
    actual = call(operator, arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert actual[0].requires_grad
    with pytest.raises(RuntimeError, match=NO_BACKWARD):
        actual[0].sum().backward()
    with pytest.raises(RuntimeError, match=NO_BACKWARD):
        torch.autograd.grad(call(operator, arguments)[0].sum(), arguments[name])
    assert arguments[name].grad is None


def test_backward_is_refused_for_keyword_tensors():
    arguments = qkv()
    arguments["v"].requires_grad_()
    for operator in (santa.decode, torch.ops.santa.decode):
        with pytest.raises(RuntimeError, match=NO_BACKWARD):
            operator(**arguments)[0].sum().backward()


def test_gradient_through_lse_is_refused(operator, device):
    """The log-sum-exp depends on q and k as well: its gradient must not come out as nothing in silence."""
    arguments = qkv(device)
    arguments["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=NO_BACKWARD):
        call(operator, arguments)[1].sum().backward()


def test_no_graph_without_gradients(operator, device):
    arguments = {name: x.requires_grad_() for name, x in qkv(device).items()}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not any(x.requires_grad for x in call(operator, arguments))


def test_errors_do_not_depend_on_gradients(operator):
    """The checks come before the forward pass of the tensors that require gradients, too."""
    arguments = {name: x.requires_grad_() for name, x in qkv().items()}
    assert_refused(operator, {**arguments, "num_samples": -1}, ValueError, r"santa: num_samples is -1; .*1048576\]")
    with torch.no_grad():
        assert_refused(operator, {**arguments, "num_samples": -1}, ValueError, r"santa: num_samples is -1; .*1048576\]")
