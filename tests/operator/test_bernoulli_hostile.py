"""Bernoulli scores of hostile and of bad input."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.bernoulli import NAN, bernoulli, draw, feature_major, tolerance
from helpers.inputs import make_qkv, working_dtype
from helpers.statistics import relative_rms

import santa

pytestmark = pytest.mark.emulate

# Hostile input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, 16])
def test_zero_query_has_equal_logits(device, num_samples):
    """No feature is read, so not even NaN keys matter; the logits are 0."""
    q, k, v = make_qkv(1, 2, 1, 200, 64, dtype=working_dtype(device), device=device)
    out, lse, features = bernoulli(
        torch.zeros_like(q),
        torch.full_like(feature_major(k), NAN),
        v,
        num_samples=num_samples,
        return_features_read=True,
    )
    assert (lse - math.log(200)).abs().max() < 1e-5 and (features == 0).all() and torch.isfinite(out).all()
    if num_samples == 0:
        assert relative_rms(out, v.double().mean(dim=1).expand(1, 2, 64)) < tolerance(q.dtype)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("num_samples", [0, 16])
def test_query_that_is_not_finite(device, value, num_samples):
    """That head is NaN; the others of its group are what they are without it."""
    q, k, v = make_qkv(1, 4, 1, 300, 64, dtype=working_dtype(device), device=device)
    k = feature_major(k)
    hostile = q.clone()
    hostile[0, 1, 5] = value
    options = {"num_samples": num_samples, "sampler": "systematic"}
    out, lse = bernoulli(hostile, k, v, **options)
    expected, expected_lse = bernoulli(q, k, v, **options)
    assert torch.isnan(out[0, 1]).all() and torch.isnan(lse[0, 1])
    others = [0, 2, 3]
    assert torch.equal(out[0, others], expected[0, others]) and torch.equal(lse[0, others], expected_lse[0, others])
    assert (draw(hostile, 1, 4, "independent")[0, 1] == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("num_samples", [0, 16])
@pytest.mark.parametrize("group, head_dim, kv_len", [(4, 64, 700), (7, 128, 3000)])
def test_features_that_a_head_did_not_draw_do_not_reach_it(device, num_samples, group, head_dim, kv_len):
    """NaN in every feature of a key that no head drew changes nothing; in one that some heads drew, those alone."""
    q, k, v = make_qkv(1, group, 1, kv_len, head_dim, dtype=working_dtype(device), device=device)
    q = q.sign() * q.abs().pow(3)  # few large elements, so that some features are drawn by no head
    k = feature_major(k)
    options = {"num_samples": num_samples, "num_draws": 1, "sampler": "systematic"}
    expected, expected_lse = bernoulli(q, k, v, **options)
    counts = draw(q, 1, 1, "independent", kv_lens=torch.tensor([kv_len]))[0]
    unread = (counts == 0).all(dim=0)
    assert 0 < unread.sum() < head_dim
    hostile = k.clone()
    hostile[0, 0, unread.to(device)] = NAN
    for a, b in zip(bernoulli(q, hostile, v, **options), (expected, expected_lse), strict=True):
        assert torch.equal(a, b)

    by_some = int((((counts != 0).sum(dim=0) > 0) & ((counts != 0).sum(dim=0) < group)).nonzero()[0])
    hostile[0, 0, by_some, 123] = NAN
    out, lse = bernoulli(q, hostile, v, **options)
    drew = (counts[:, by_some] != 0).to(device)
    assert torch.isnan(out[0, drew]).all() and torch.isnan(lse[0, drew]).all()
    assert torch.equal(out[0, ~drew], expected[0, ~drew]) and torch.equal(lse[0, ~drew], expected_lse[0, ~drew])


@pytest.mark.sanitize
@pytest.mark.parametrize("num_samples", [0, 64])
@pytest.mark.parametrize("group", [4, 8])
def test_infinite_keys(device, num_samples, group):
    """A logit of -inf is a key that weighs nothing; one of +inf leaves the head undefined; a head that did not draw the
    feature does not see it."""
    q, k, v = make_qkv(1, group, 1, 1500, 64, dtype=working_dtype(device), device=device)
    q = q.sign()  # drawn for certain: logits are exact
    q[0, 0, 7] = 0.0
    k = feature_major(k)
    options = {"num_samples": num_samples, "num_draws": 1, "sampler": "systematic"}
    expected = bernoulli(q, k, v, **options)
    k[0, 0, 7, 1234] = -math.inf
    out, lse = bernoulli(q, k, v, **options)
    assert torch.equal(out[0, 0], expected[0][0, 0]) and torch.equal(lse[0, 0], expected[1][0, 0])
    scores = torch.einsum("hd,dn->hn", q[0].double().cpu(), k[0, 0].double().cpu().nan_to_num(neginf=0.0)) / 8
    scores[:, 1234] = -math.inf
    without = q[0, :, 7] > 0
    assert 0 < without.sum() < group - 1
    assert (lse[0].double().cpu() - scores.logsumexp(dim=-1))[without.cpu()].abs().max() < 2e-5
    assert torch.isfinite(out[0, without]).all() and torch.isnan(out[0, q[0, :, 7] < 0]).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("num_samples", [0, 16])
def test_no_key_and_one_key(device, num_samples):
    q, k, v = make_qkv(3, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    k = feature_major(k)
    k[0], v[0] = NAN, NAN
    lens = torch.tensor([0, 1, 50], dtype=torch.int32, device=device)
    out, lse, rows, features = bernoulli(
        q, k, v, kv_lens=lens, num_samples=num_samples, return_rows_read=True, return_features_read=True
    )
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and (rows[0] == 0).all() and (features[0] == 0).all()
    assert relative_rms(out[1].unflatten(0, (2, 2)), v[1, 0, :, None].expand(2, 2, 64)) < 1e-6
    assert (rows[1] == 1).all() and torch.isfinite(out).all()


def test_empty_cache_and_empty_batch(device):
    q, k, v = make_qkv(2, 4, 2, 0, 64, dtype=working_dtype(device), device=device)
    for num_samples in (0, 16):
        out, lse, features = bernoulli(q, k.reshape(2, 2, 64, 0), v, num_samples=num_samples, return_features_read=True)
        assert (out == 0).all() and (lse == -math.inf).all() and (features == 0).all()
    out, _ = bernoulli(q[:0], k.reshape(2, 2, 64, 0)[:0], v[:0])
    assert out.shape == (0, 4, 64)


def test_rows_outside_the_cache(device):
    q, k, v = make_qkv(2, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    lens = torch.tensor([51, 50], dtype=torch.int32, device=device)
    for num_samples in (0, 16):
        if device == "cpu":
            with pytest.raises(ValueError, match="row 0 has kv_lens 51"):
                bernoulli(q, feature_major(k), v, kv_lens=lens, num_samples=num_samples)
            continue
        out, lse, features = bernoulli(
            q, feature_major(k), v, kv_lens=lens, num_samples=num_samples, return_features_read=True
        )
        assert torch.isnan(out[0]).all() and torch.isnan(lse[0]).all() and (features[0] == -1).all()
        assert torch.isfinite(out[1]).all()


def test_strided_inputs(device):
    """Strides of the cache, and a q whose heads are apart."""
    q, k, v = make_qkv(2, 4, 2, 333, 64, dtype=working_dtype(device), device=device)
    k = feature_major(k)
    expected = bernoulli(q, k, v)[0]
    wide = torch.full((2, 3, 70, 341), NAN, dtype=k.dtype, device=device)
    wide[:, :2, :64, 5:338] = k
    apart = torch.full((2, 4, 67), NAN, dtype=q.dtype, device=device)
    apart[..., :64] = q
    assert torch.equal(bernoulli(apart[..., :64], wide[:, :2, :64, 5:338], v)[0], expected)


# Errors ------------------------------------------------------------------------------------------------


def test_errors(device):
    q, k, v = make_qkv(2, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    rows, k = k, feature_major(k)
    other = torch.float16 if q.dtype != torch.float16 else torch.bfloat16
    scale = torch.ones((), device=device)
    for message, inputs, options in (
        (r"k_features has shape \[2, 50, 2, 64\]; dimension 2 \(head_dim\)", (q, rows, v), {}),
        ("k_features is .*; it needs to be .*, q's dtype", (q, k.to(other), v), {}),
        ("v has shape .* needs to be 50", (q, k, v[:, :49]), {}),
        ("k_features has stride 64 in its last dimension", (q, rows.permute(0, 2, 3, 1).mT.contiguous().mT, v), {}),
        (r"num_draws is 0; it needs to be in \[1, 4096\]", (q, k, v), {"num_draws": 0}),
        (r"num_draws is 4097; it needs to be in \[1, 4096\]", (q, k, v), {"num_draws": 4097}),
        ("score_sampler is 3; it needs to be one of 'independent'", (q, k, v), {"score_sampler": 3}),
        ("score_sampler is 'twice'", (q, k, v), {"score_sampler": "twice"}),
        ("k_scale is given with score='bernoulli'", (q, k, v), {"k_scale": scale}),
        ("k_features has 2 KV heads", (q[:, :3], k, v), {}),
        (r"q has shape .*: pass q\.squeeze\(2\)", (q.unsqueeze(2), k, v), {}),
        (
            r"v has .*num_kv_heads of k_features, in kv_layout 'NHD'\) is 50 and needs to be 2",
            (q, k, v.transpose(1, 2)),
            {},
        ),
        (
            r"kv_lens is int64; it needs to be int32: pass kv_lens\.to\(torch\.int32\)",
            (q, k, v),
            {"kv_lens": torch.tensor([1, 2], device=device)},
        ),
        ("num_samples is -1", (q, k, v), {"num_samples": -1}),
    ):
        if "stride" in message:
            inputs = (q, k.mT.contiguous().mT, v)
            message = "k_features has stride .* in its last dimension"
        with pytest.raises(ValueError, match=message):
            bernoulli(*inputs, **options)
    for name, value in (("num_draws", 4), ("score_sampler", "shared"), ("return_features_read", True)):
        with pytest.raises(ValueError, match=f"{name} is given with score='exact'"):
            santa.decode(q, rows, v, **{name: value})
    with pytest.raises(ValueError, match="score is 'noisy'; it needs to be 'exact' or 'bernoulli'"):
        santa.decode(q, rows, v, score="noisy")
    with pytest.raises(TypeError, match="num_draws is a float"):
        bernoulli(q, k, v, num_draws=2.0)


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_counts_beyond_the_whole_numbers_of_the_dtype(device, dtype, most):
    """In one pass CUDA multiplies keys with counts in q's dtype: more draws than it has whole numbers for are refused,
    by a rule that does not look at lengths. The other kinds of row and the CPU take them all."""
    q, k, v = make_qkv(1, 4, 2, 50, 64, dtype=dtype, device=device)
    k = feature_major(k)
    for options in ({}, {"budget": "uniform"}, {"sampler": "systematic"}):
        options = {"num_samples": 8, **options}
        bernoulli(q, k, v, num_draws=most, **options)
        if device == "cpu":
            bernoulli(q, k, v, num_draws=4096, **options)
            continue
        with pytest.raises(ValueError, match=f"num_draws is {most + 1}; on CUDA it needs to be at most {most} for"):
            bernoulli(q, k, v, num_draws=most + 1, **options)
    for options in ({"num_samples": 0}, {"budget": "proportional"}, {"sampler": "stratified"}):
        bernoulli(q, k, v, num_draws=4096, **{"num_samples": 8, **options})


def test_no_backward(device):
    q, k, v = make_qkv(1, 4, 2, 50, 64, dtype=working_dtype(device), device=device)
    q.requires_grad_()
    out, _ = bernoulli(q, feature_major(k), v)
    with pytest.raises(RuntimeError, match="no backward pass"):
        out.sum().backward()
