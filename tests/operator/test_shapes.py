"""head_dims that there are kernels for, those that are padded to them, and those that are refused."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from helpers.bernoulli import feature_major
from helpers.inputs import HEAD_DIMS, make_qkv, working_dtype
from helpers.statistics import relative_rms

import santa
from santa import reference, shapes

# Widths of models and around the kernels' own.
PADDED = [1, 16, 32, 48, 63, 65, 72, 80, 95, 97, 112, 120, 127, 129, 160, 191, 193, 255]
# K and V of different width: the first two are those of DeepSeek and of its first layers' ratio upside down.
PAIRS = [(192, 128), (128, 192), (64, 128), (80, 64), (64, 80), (24, 200), (256, 64)]
# Relative error to float64 over 300 keys, which the kernels' own widths have as well: rounding of float32 sums, and of
# an output in 16 bits.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 1e-3}


def make(head_dim, v_head_dim=None, *, kv_len=300, dtype=torch.float32, device="cpu", layout="NHD"):
    """As make_qkv, with v of its own width."""
    width = max(head_dim, v_head_dim or 0)
    q, k, v = make_qkv(2, 8, 2, kv_len, width, dtype=dtype, device=device, layout=layout, seed=width)
    return tuple(x[..., :n].contiguous() for x, n in ((q, head_dim), (k, head_dim), (v, v_head_dim or head_dim)))


def zeros_behind(x, width, axis=-1):
    shape = list(x.shape)
    shape[axis] = width
    wide = x.new_zeros(shape)
    wide.narrow(axis, 0, x.shape[axis]).copy_(x)
    return wide


# What is said of a width -----------------------------------------------------------------------------


def test_width_of_a_head_dim():
    assert tuple(HEAD_DIMS) == shapes.DECODE_HEAD_DIMS
    for width in range(1, 257):
        padded = santa.padded_head_dim(width)
        assert padded == min(native for native in HEAD_DIMS if native >= width)
        assert santa.padded_head_dim(width, width) == santa.padded_head_dim(1, width) == padded
    assert santa.padded_head_dim(192, 128) == 192 and santa.padded_head_dim(64, 128) == 128
    assert santa.padded_head_dim(80, prefill=True) == 128 and santa.padded_head_dim(64, prefill=True) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"head_dim": 512},
            r"santa: q has head_dim 512; it needs to be from 1 to 256: kernels keep .*dense attention.*",
        ),
        ({"head_dim": 64, "v_head_dim": 257}, r"santa: v has head_dim 257; it needs to be from 1 to 256: .*"),
        ({"head_dim": 129, "prefill": True}, r"santa: q has head_dim 129; it needs to be from 1 to 128: .*64, 128 .*"),
        ({"head_dim": 0}, r"santa: q has head_dim 0; it needs to be from 1 to 256: .*"),
        ({"head_dim": 64, "v_head_dim": 0}, r"santa: v has head_dim 0; it needs to be from 1 to 256: .*"),
    ],
)
def test_width_that_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        santa.padded_head_dim(**arguments)
    assert re.fullmatch(message, str(caught.value))


@pytest.mark.parametrize("width", [*range(1, 258, 13), 64, 96, 128, 192, 256, 512])
def test_the_operators_take_what_is_said_to_be_native(device, width):
    """torch.ops pads nothing: this fails where the list of widths and the kernels part."""
    q, k, v = make(width, kv_len=8, dtype=torch.float16, device=device)
    calls = [
        (shapes.DECODE_HEAD_DIMS, lambda: torch.ops.santa.decode(q, k, v)),
        (shapes.DECODE_HEAD_DIMS, lambda: torch.ops.santa.decode_bernoulli(q, feature_major(k), v)),
        (shapes.PREFILL_HEAD_DIMS, lambda: torch.ops.santa.sample_select(q.unsqueeze(2), k.transpose(1, 2)[:, :, :1])),
    ]
    for widths, run in calls:
        if width in widths:
            run()
        else:
            with pytest.raises(ValueError, match=f"santa: q has head_dim {width}; it needs to be"):
                run()


# Decode ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::santa.PaddingWarning")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), [*((width, width) for width in [*HEAD_DIMS, *PADDED]), *PAIRS])
def test_decode_is_that_of_the_head_dim_given(device, head_dim, v_head_dim, layout):
    dtype = working_dtype(device)
    q, k, v = make(head_dim, v_head_dim, dtype=dtype, device=device, layout=layout)
    kv_lens = torch.tensor([300, 170], dtype=torch.int32, device=device)
    out, lse = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=0, kv_layout=layout)
    wide = [zeros_behind(x, santa.padded_head_dim(head_dim, v_head_dim)) for x in (q, k, v)]
    by_hand = torch.ops.santa.decode(
        *wide, kv_lens=kv_lens, num_samples=0, kv_layout=int(layout == "HND"), sm_scale=1 / math.sqrt(head_dim)
    )
    assert torch.equal(out, by_hand[0][..., :v_head_dim]) and torch.equal(lse, by_hand[1])
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu(), kv_lens=kv_lens.cpu(), kv_layout=layout)
    assert out.shape == (2, 8, v_head_dim) and out.is_contiguous() and out.dtype == dtype
    assert relative_rms(out, expected) < TOLERANCE[dtype]
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-6, atol=2e-6)
    sm_scale = 0.7 / math.sqrt(head_dim)
    scaled, _ = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=0, kv_layout=layout, sm_scale=sm_scale)
    expected, _ = reference.exact(q.cpu(), k.cpu(), v.cpu(), kv_lens=kv_lens.cpu(), kv_layout=layout, sm_scale=sm_scale)
    assert relative_rms(scaled, expected) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::santa.PaddingWarning")
def test_sampled_rows_are_those_of_padded_tensors(device):
    q, k, v = make(80, 72, kv_len=700, dtype=working_dtype(device), device=device)
    options = {"num_samples": 16, "min_sampled_len": 0, "seed": 5}
    out, lse, rows_read = santa.decode(q, k, v, **options, return_rows_read=True)
    wide = [zeros_behind(x, 96) for x in (q, k, v)]
    expected = santa.decode(*wide, **options, sm_scale=1 / math.sqrt(80), return_rows_read=True)
    assert torch.equal(out, expected[0][..., :72]) and torch.equal(lse, expected[1])
    assert torch.equal(rows_read, expected[2]) and (rows_read < 700).all()


@pytest.mark.parametrize("v_head_dim", [80, 96])
def test_cache_that_is_kept_padded(device, v_head_dim):
    """q as it is, k in the padded width: the same bits, without a copy of k; out is as wide as v."""
    q, k, v = make(80, dtype=working_dtype(device), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", santa.PaddingWarning)
        expected, expected_lse = santa.decode(q, k, v, num_samples=0)
    k, v = zeros_behind(k, 96), zeros_behind(v, v_head_dim) if v_head_dim == 96 else v
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out, lse = santa.decode(q, k, v, num_samples=0)
    assert out.shape[-1] == v_head_dim
    assert torch.equal(out[..., :80], expected) and torch.equal(lse, expected_lse)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (v_head_dim == 80) and all("santa.decode copies v in every call" in x for x in messages)


def test_copies_are_warned_of_and_nothing_else():
    with pytest.warns(
        santa.PaddingWarning, match="santa.decode copies k and v in every call .* to 96, .*96 wide"
    ) as got:
        santa.decode(*make(80))
    assert got[0].filename == __file__
    with pytest.warns(santa.PaddingWarning, match="santa.decode copies v in every call .* to 192"):
        santa.decode(*make(192, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width in HEAD_DIMS:
            santa.decode(*make(width))
        q, k, v = make(80)
        santa.decode(q, zeros_behind(k, 96), zeros_behind(v, 96))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((80, 128, 80), r"santa: k has shape .*, 128\]; dimension 3 \(head_dim\) is 128 and needs to be 80, or 96, .*"),
        ((80, 64, 80), r"santa: k has shape .*; dimension 3 \(head_dim\) is 64 and needs to be 80, or 96, .*"),
        ((64, 128, 128), r"santa: k has shape .*; dimension 3 \(head_dim\) is 128 and needs to be 64"),
        ((512, 512, 512), r"santa: q has head_dim 512; it needs to be from 1 to 256: .*"),
        ((64, 64, 512), r"santa: v has head_dim 512; it needs to be from 1 to 256: .*"),
        ((0, 0, 0), r"santa: q has head_dim 0; it needs to be from 1 to 256: .*"),
    ],
)  # fmt: skip
def test_decode_refuses(widths, message, layout):
    q, k, v = (make(width, layout=layout)[index] for index, width in enumerate(widths))
    with pytest.raises(ValueError) as caught:
        santa.decode(q, k, v, kv_layout=layout)
    assert re.fullmatch(message, str(caught.value)), caught.value


@pytest.mark.filterwarnings("ignore::santa.PaddingWarning")
@pytest.mark.parametrize("per_head", [False, True])
def test_float8_cache(device, per_head):
    q, k, v = make(80, 72, dtype=working_dtype(device), device=device)
    (k8, k_scale), (v8, v_scale) = (santa.quantize_kv(x, per_head=per_head) for x in (k, v))
    out, lse = santa.decode(q, k8, v8, k_scale=k_scale, v_scale=v_scale, num_samples=0)
    expected, expected_lse = reference.exact(
        q.cpu(), k8.cpu().float(), v8.cpu().float(), k_scale=k_scale.cpu(), v_scale=v_scale.cpu()
    )
    assert relative_rms(out, expected) < TOLERANCE[working_dtype(device)]
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::santa.PaddingWarning")
@pytest.mark.parametrize("score_sampler", ["independent", "systematic", "shared"])
def test_bernoulli_scores(device, score_sampler):
    """Zeros of the query are never drawn: the features read are those of the head_dim given."""
    q, k, v = make(80, 48, dtype=working_dtype(device), device=device)
    options = {
        "score": "bernoulli",
        "score_sampler": score_sampler,
        "num_samples": 0,
        "seed": 2,
        "return_features_read": True,
    }
    out, lse, features = santa.decode(q, feature_major(k), v, **options)
    wide = zeros_behind(q, 96), zeros_behind(feature_major(k), 96, -2), zeros_behind(v, 96)
    expected = santa.decode(*wide, **options, sm_scale=1 / math.sqrt(80))
    assert torch.equal(out, expected[0][..., :48]) and torch.equal(lse, expected[1])
    assert torch.equal(features, expected[2]) and (features <= 80).all() and (features > 0).all()
    kept = santa.decode(q, *wide[1:], **options)
    assert torch.equal(kept[0], expected[0]) and torch.equal(kept[2], features)
    with pytest.raises(ValueError, match=r"santa: k_features has shape .*; dimension 2 \(head_dim\) is 72 and needs"):
        santa.decode(q, feature_major(k)[:, :, :72], v, **options)


@pytest.mark.parametrize("kept", [False, True])
def test_decode_compiles(device, kept):
    q, k, v = make(80, dtype=working_dtype(device), device=device)
    if kept:
        k, v = zeros_behind(k, 96), zeros_behind(v, 96)

    def step(q, k, v):
        return santa.decode(q * 2, k, v, num_samples=16, min_sampled_len=0, return_rows_read=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", santa.PaddingWarning)
        expected = step(q, k, v)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    for ours, theirs in zip(compiled, expected, strict=True):
        assert torch.equal(ours, theirs)


# Prefill -----------------------------------------------------------------------------------------------


def dense_causal(q, k, v):
    """Causal attention in float64, and its log-sum-exp."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    q_len, kv_len = scores.shape[-2:]
    scores = scores.masked_fill(torch.ones(q_len, kv_len).triu(kv_len - q_len + 1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("q_len", [200, 72])
@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"), [(1, 1), (16, 16), (80, 80), (96, 96), (112, 112), (128, 64), (20, 100)]
)
def test_prefill_is_that_of_the_head_dim_given(head_dim, v_head_dim, backend, q_len):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, q_len, head_dim, generator=generator)
    k, v = (torch.randn(1, 2, 200, width, generator=generator) for width in (head_dim, v_head_dim))
    v = v + 1
    out, lse = santa.prefill(q, k, v, alpha=1.0, backend=backend)
    expected, expected_lse = dense_causal(q, k, v)
    assert out.shape == (1, 4, q_len, v_head_dim) and out.is_contiguous()
    assert relative_rms(out, expected) < 4e-7
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)


def test_selection_is_that_of_the_head_dim_given():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 600, 80, generator=generator) * 3, torch.randn(1, 2, 600, 80, generator=generator)
    options = {"alpha_c": 0.5, "alpha_s": 0.5, "sink_blocks": 0, "window_blocks": 1}
    expected = torch.ops.santa.sample_select(
        zeros_behind(q, 128), zeros_behind(k, 128), **options, sm_scale=1 / math.sqrt(80)
    )
    for ours, theirs in zip(santa.sample_select(q, k, **options), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert expected[2][..., 0].min() < 1  # blocks were left out, so there was something to get wrong
