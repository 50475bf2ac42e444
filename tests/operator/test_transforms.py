"""Derivatives, vmap and autocast: of every operator and every output, in each way that torch has to ask for them."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.bernoulli import feature_major
from helpers.inputs import make_qkv
from torch.autograd import forward_ad

import santa


def decode_inputs():
    return make_qkv(1, 4, 2, 40, 64)


def bernoulli_inputs():
    q, k, v = decode_inputs()
    return q, feature_major(k), v


def paged(operator):
    """One row of 40 keys as pages of 8, as views of k and v."""

    def run(q, k, v):
        table = torch.arange(5, dtype=torch.int32, device=q.device).unsqueeze(0)
        lens = torch.full((1,), 40, dtype=torch.int32, device=q.device)
        pages = (x.reshape(5, 8, 2, 64) for x in (k, v))
        return operator(q, *pages, page_table=table, kv_lens=lens, num_samples=8, min_sampled_len=0)

    return run


PROPOSAL = santa.make_proposal_keys(decode_inputs()[1])


def proposal(q, k, v):
    keys = dataclasses.replace(PROPOSAL, **{name: x.to(q.device) for name, x in PROPOSAL.tensors().items()})
    return santa.decode(q, k, v, proposal=keys, num_samples=8, min_sampled_len=0)


def prefill_inputs(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 150, 64), (1, 2, 150, 64), (1, 2, 150, 64)]
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def prefill(backend):
    def run(q, k, v):
        out, lse, stats = santa.prefill(q, k, v, backend=backend, return_stats=True)
        return out, lse, *(() if stats.heads is None else (stats.heads,))

    return run


# name in the message, function, inputs. The outputs are all that floating-point numbers come out of.
OPERATORS = {
    "decode": ("decode", lambda *x: santa.decode(*x, num_samples=8, min_sampled_len=0), decode_inputs),
    "decode, rows read": ("decode", lambda *x: santa.decode(*x, return_rows_read=True)[:2], decode_inputs),
    "ops.decode": ("decode", torch.ops.santa.decode, decode_inputs),
    "decode, new tokens": ("decode", lambda q, k, v: santa.decode(q.unsqueeze(1), k, v), decode_inputs),
    "decode_paged": ("decode_paged", paged(santa.decode_paged), decode_inputs),
    "ops.decode_paged": ("decode_paged", paged(torch.ops.santa.decode_paged), decode_inputs),
    "decode_proposal": ("decode_proposal", proposal, decode_inputs),
    "decode_bernoulli": ("decode_bernoulli", lambda *x: santa.decode(*x, score="bernoulli"), bernoulli_inputs),
    "ops.decode_bernoulli": (
        "decode_bernoulli",
        lambda *x: torch.ops.santa.decode_bernoulli(*x)[:2],
        bernoulli_inputs,
    ),
    "prefill, dense": ("prefill", prefill("dense"), prefill_inputs),
    "prefill, reference": ("prefill", prefill("reference"), prefill_inputs),
    "sample_select": (
        "sample_select",
        lambda q, k: santa.sample_select(q, k)[2:],
        lambda: prefill_inputs()[:2],
    ),
}


def backward(f, x):
    x = x.clone().requires_grad_()
    (f(x).sum() + x.sum()).backward()  # x gets a gradient from elsewhere, which would hide that this one is dropped
    return x.grad


def autograd_grad(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def vmap_of_grad(f, x):
    return torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, x]))


TRANSFORMS = {
    "backward": backward,
    "autograd.grad": autograd_grad,
    "dual": dual,
    "func.grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "func.vjp": lambda f, x: torch.func.vjp(lambda x: f(x).sum(), x)[1](torch.tensor(1.0)),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "func.jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x).sum())(x),
    # Of one factor of x: of x itself they would push every element forward.
    "func.jacfwd": lambda f, x: torch.func.jacfwd(lambda factor: f(factor * x).sum())(torch.tensor(1.0)),
    "func.hessian": lambda f, x: torch.func.hessian(lambda factor: f(factor * x).sum())(torch.tensor(1.0)),
    "vmap of func.grad": vmap_of_grad,
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(lambda x: f(x).sum(), x),
}


# Every transform of every output with respect to the first argument, and two of them to the others.
CASES = [
    (operator, output, argument, transform)
    for operator, (_, function, inputs) in OPERATORS.items()
    for output in range(len(function(*inputs())))
    for argument in range(len(inputs()))
    for transform in TRANSFORMS
    if argument == 0 or transform in ("backward", "func.jvp")
]


@pytest.mark.parametrize(("operator", "output", "argument", "transform"), CASES)
def test_derivative_is_refused(operator, output, argument, transform):
    """Not zero, and not None: the message says that there is none."""
    name, function, inputs = OPERATORS[operator]
    tensors = list(inputs())

    def f(x):
        return function(*tensors[:argument], x, *tensors[argument + 1 :])[output]

    match = f"santa: {name} has no backward pass and no forward derivative .*no_grad"
    if name == "prefill" and transform == "vmap of func.grad":  # prefill is Python: vmap is asked first
        match = "santa: prefill cannot run under vmap"
    with pytest.raises(RuntimeError, match=match):
        TRANSFORMS[transform](f, tensors[argument])


@pytest.mark.parametrize("operator", OPERATORS)
def test_derivatives_of_something_else_are_not(operator):
    """A transform of a function that uses an operator beside what it differentiates."""
    _, function, inputs = OPERATORS[operator]
    tensors = inputs()
    constant = function(*tensors)[0].sum()
    x = torch.tensor(3.0)

    def f(x):
        return x * x * function(*tensors)[0].sum()

    assert torch.equal(torch.func.grad(f)(x), 6 * constant)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (torch.tensor(1.0),))[1], 6 * constant)
    with torch.no_grad():
        asked = [y.clone().requires_grad_() for y in tensors]
        assert not any(y.requires_grad for y in function(*asked))


@pytest.mark.parametrize("transform", ["dual", "func.jvp", "func.grad", "backward"])
def test_appending_is_refused(transform):
    k_features, k_new, positions = torch.zeros(1, 2, 64, 8), torch.ones(1, 1, 2, 64), torch.zeros(1, dtype=torch.int32)

    def f(k_new):
        santa.append_k_features(k_features, k_new, positions)
        return k_features

    with pytest.raises(RuntimeError, match="santa: append_k_features has no backward pass and no forward derivative"):
        TRANSFORMS[transform](f, k_new)
    assert not k_features.any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_says_that_the_operator_is_batched(operator):
    name, function, inputs = OPERATORS[operator]
    stacked = [torch.stack([x, x]) for x in inputs()]
    with pytest.raises(RuntimeError, match=f"santa: {name} cannot run under vmap; it takes a batch itself"):
        torch.func.vmap(function)(*stacked)


# Autocast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_casts(device, operator, dtype, mixed):
    """The bits of inputs that were cast by hand; `mixed`: q in float32 as a norm leaves it, k and v cast already."""
    _, function, inputs = OPERATORS[operator]
    tensors = [x.to(device) for x in inputs()]
    expected = function(*(x.to(dtype) for x in tensors))
    if mixed:
        tensors[1:] = (x.to(dtype) for x in tensors[1:])
    with torch.autocast(device, dtype=dtype):
        actual = function(*tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_autocast_as_torchs_attention_does(device):
    """Dtypes of the output for every pair of dtypes of the input and of autocast, and where autocast is off."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    q, k, v = (x.to(device) for x in decode_inputs())
    for inner in dtypes:
        for outer in dtypes[:2]:
            for enabled in (True, False):
                if device == "cuda" and inner == torch.float32 and not enabled:
                    continue  # refused, as without autocast
                cast = [x.to(inner) for x in (q, k, v)]
                with torch.autocast(device, dtype=outer, enabled=enabled):
                    ours = santa.decode(*cast)[0].dtype
                    query, key, value = cast[0].unsqueeze(2), cast[1].transpose(1, 2), cast[2].transpose(1, 2)
                    theirs = F.scaled_dot_product_attention(query, key, value, enable_gqa=True).dtype
                assert ours == theirs


def test_autocast_leaves_float64_to_be_refused(device):
    q, k, v = (x.to(device).double() for x in decode_inputs())
    with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(ValueError, match="santa: q is float64"):
        santa.decode(q, k, v)


def test_autocast_leaves_caches_in_8_bits_and_scales_alone(device):
    q, k, v = (x.to(device) for x in decode_inputs())
    k8, k_scale = santa.quantize_kv(k)
    expected = santa.decode(q.bfloat16(), k8, v.bfloat16(), k_scale=k_scale)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = santa.decode(q, k8, v, k_scale=k_scale)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_with_gradients_and_rows_read(device):
    """Autocast comes before autograd: the cast is differentiable, the attention is not."""
    q, k, v = (x.to(device) for x in decode_inputs())
    q.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse, rows_read = santa.decode(q, k, v, return_rows_read=True)
    assert out.dtype == torch.bfloat16 and (rows_read == 40).all()
    with pytest.raises(RuntimeError, match="santa: decode has no backward pass"):
        lse.sum().backward()


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_under_compile(device, inside):
    q, k, v = (x.to(device) for x in decode_inputs())
    autocast = torch.autocast(device, dtype=torch.bfloat16)

    def step(q, k, v):
        with autocast if inside else contextlib.nullcontext():
            return santa.decode(q * 2, k, v, num_samples=8, min_sampled_len=0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with contextlib.nullcontext() if inside else autocast:
        actual, expected = compiled(q, k, v), step(q, k, v)
    assert actual[0].dtype == torch.bfloat16
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_appending_under_autocast_keeps_the_dtype_of_the_cache(device):
    k_features = torch.zeros(1, 2, 64, 8, device=device, dtype=torch.float16)
    k_new = torch.ones(1, 1, 2, 64, device=device, dtype=torch.float16)
    with torch.autocast(device, dtype=torch.bfloat16):
        santa.append_k_features(k_features, k_new, torch.zeros(1, dtype=torch.int32, device=device))
    assert k_features[..., 0].eq(1).all()
