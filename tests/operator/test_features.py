"""What models have beside plain attention: sliding windows, logits soft caps, attention sinks, left padding, scales of
float8 caches, heads that are a part of a model's. Exact and sampled, alone and together."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.float8 import heads_apart, on_cpu, quantised
from helpers.inputs import SAMPLED, dtypes_of, make_qkv, repeat_rows, working_dtype
from helpers.paged import assert_same_bits
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z, relative_rms

import santa
from santa import reference

OPTIONS = [("grouped", "streaming", 0)] + [(*combination, 32) for combination in SAMPLED]
KV_LEN, HEADS, KV_HEADS = 700, 8, 2
SINKS = torch.linspace(-3, 9, HEADS)  # next to nothing of the mass, and next to all of it

# name -> options; those that are tensors on the CPU. float8: k and v are quantised and their scales added.
FEATURES = {
    "none": {},
    "window": {"window_left": 200},
    "window of one key": {"window_left": 0},
    "window at a tile's edge": {"window_left": 127},
    "window longer than the row": {"window_left": 2000},
    "soft cap": {"logits_soft_cap": 2.0},
    "sinks": {"sinks": SINKS},
    "padding": {"kv_starts": torch.tensor([37, 0], dtype=torch.int32)},
    "scales": {"float8": "per head"},
    "numbers as scales": {"float8": "numbers"},
    "gpt-oss": {"window_left": 127, "sinks": SINKS},
    "Gemma 2": {"window_left": 300, "logits_soft_cap": 2.0, "sm_scale": 0.3},
    "all": {
        "window_left": 150,
        "logits_soft_cap": 3.0,
        "sinks": SINKS,
        "kv_starts": torch.tensor([11, 129], dtype=torch.int32),
        "float8": "per head",
        "sm_scale": -0.2,
    },
}


@pytest.fixture(params=OPTIONS, ids=lambda o: f"{o[0]}-{o[1]}-{o[2]}")
def options(request):
    sampler, budget, num_samples = request.param
    return {"sampler": sampler, "budget": budget, "num_samples": num_samples, "min_sampled_len": 0}


def problem(name, device, *, q_len=None, dtype=None, batch=2):
    """(q, k, v) and the options of a feature, on the device. Heads have magnitudes of their own: 1, 2 in k and v."""
    dtype = working_dtype(device) if dtype is None else dtype
    tokens = 1 if q_len is None else q_len
    q, k, v = make_qkv(batch, tokens * HEADS, KV_HEADS, KV_LEN, 64, dtype=dtype, device=device, logit_std=1.2)
    if q_len is not None:
        q = q.unflatten(1, (q_len, HEADS))
    k, v = heads_apart(k, "NHD") / 2, heads_apart(v, "NHD")
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in FEATURES[name].items()}
    float8 = given.pop("float8", None)
    if float8 is not None:
        k, v, scales = quantised("fp8", k, v, per_head=float8 == "per head")
        given |= {n: x if float8 == "per head" else float(x) for n, x in scales.items()}
    if "kv_starts" in given:
        given["kv_starts"] = given["kv_starts"][:batch]
        given["kv_lens"] = torch.tensor([600, 533][:batch], dtype=torch.int32, device=device)
    return (q, k, v), given


def oracle(qkv, given):
    given = on_cpu(**{n: x for n, x in given.items() if isinstance(x, torch.Tensor)}) | {
        n: x for n, x in given.items() if not isinstance(x, torch.Tensor)
    }
    return reference.exact(*(x.cpu() for x in qkv), **given)


# Exact and sampled, against float64 ----------------------------------------------------------------------


@pytest.mark.emulate
@pytest.mark.sanitize
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("q_len", [None, 3])
def test_exact(device, name, q_len):
    for dtype in dtypes_of(device):
        qkv, given = problem(name, device, q_len=q_len, dtype=dtype)
        out, lse = santa.decode(*qkv, num_samples=0, **given)
        expected, expected_lse = oracle(qkv, given)
        assert relative_rms(out, expected) < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
        torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=2e-6, atol=2e-5)
        if name not in ("none", "window longer than the row"):  # it does something
            plain = {n: x for n, x in given.items() if n == "kv_lens"}
            assert relative_rms(santa.decode(*qkv, num_samples=0, **plain)[0], expected) > 0.01


@pytest.mark.parametrize(
    ("name", "q_len"),
    [(name, None) for name in FEATURES if name != "none"] + [(name, 2) for name in ("window", "gpt-oss", "all")],
)
@pytest.mark.parametrize(("sampler", "budget"), SAMPLED)
def test_unbiased(device, name, sampler, budget, q_len):
    """The mean of N draws is the float64 oracle (z-tests, false-alarm rate 2e-6), and the same tests see a bias of 5%;
    the log-sum-exp is exact in every draw."""
    count = 1024
    qkv, given = problem(name, device, q_len=q_len, batch=1)
    expected, expected_lse = oracle(qkv, given)
    for n in ("kv_lens", "kv_starts"):
        if n in given:
            given[n] = given[n].expand(count).contiguous()
    out, lse = santa.decode(
        *(repeat_rows(x, count) for x in qkv),
        row_seeds=torch.arange(count, device=device),
        num_samples=8,
        sampler=sampler,
        budget=budget,
        min_sampled_len=0,
        **given,
    )
    assert (lse.double().cpu() - expected_lse).abs().max() < 1e-4
    if name == "window of one key":  # nothing is left to chance
        expected = expected.expand_as(out)
        torch.testing.assert_close(out.double().cpu(), expected, rtol=2e-3, atol=1e-5)
        return
    rounding = torch.finfo(out.dtype).eps / 2
    projected, largest = mean_z(out, expected[0], rounding=rounding)
    assert abs(projected) < Z_PROJECTED and largest < Z_LARGEST, (projected, largest)
    assert abs(mean_z(out * 1.05, expected[0])[0]) > Z_PROJECTED, "the test could not see a bias of 5%"


# Windows ------------------------------------------------------------------------------------------------


def periodic(device, period, *, q_len=None):
    """A row whose keys and values repeat themselves, so that a window of `period` keys holds the same ones, in the same
    order, at lengths that are a period apart."""
    (q, k, v), _ = problem("none", device, q_len=q_len, batch=1)
    return q, *(x[:, :period].repeat(1, 5, 1, 1) for x in (k, v))


def at_length(qkv, kv_len, **options):
    kv_lens = torch.tensor([kv_len], dtype=torch.int32, device=qkv[0].device)
    return santa.decode(*qkv, kv_lens=kv_lens, **options)


def test_window_of_constant_length_draws_fresh_numbers(device, options):
    """The same keys in the window at each step, and other draws; given the same position, the same draws, to the bit:
    what is drawn depends on the window's keys and on the position, not on where the window lies."""
    qkv = periodic(device, 257)
    options |= {"window_left": 256, "return_rows_read": True}
    steps = [at_length(qkv, length, **options) for length in (514, 771, 1028)]
    assert all(torch.equal(step[1], steps[0][1]) for step in steps)
    assert_same_bits(at_length(qkv, 771, **options), steps[1])
    positions = torch.tensor([12], dtype=torch.int32, device=device)
    fixed = [at_length(qkv, length, positions=positions, **options) for length in (514, 771, 1028)]
    for step in fixed:
        assert_same_bits(step, fixed[0])
    if options["num_samples"] == 0:
        assert all(torch.equal(step[0], steps[0][0]) for step in steps)
    else:
        assert len({tuple(step[0].flatten().tolist()) for step in steps}) == 3


@pytest.mark.emulate
def test_window_is_a_row_of_its_own(device, options):
    """The bits of a call on the window's keys alone, at the position of the whole row."""
    (q, k, v), _ = problem("none", device)
    kv_lens = torch.tensor([KV_LEN, 150], dtype=torch.int32, device=device)
    for q_len, window_left in ((1, 299), (4, 296)):  # 300 keys that any token sees
        tokens = q.unsqueeze(1) * torch.linspace(1, -1, q_len, dtype=q.dtype, device=device).view(1, -1, 1, 1)
        actual = santa.decode(tokens, k, v, kv_lens=kv_lens, window_left=window_left, return_rows_read=True, **options)
        one = slice(0, 1)
        alone = santa.decode(
            tokens[one],
            *(x[one, KV_LEN - 300 :] for x in (k, v)),
            positions=kv_lens[one],
            window_left=window_left,
            return_rows_read=True,
            **options,
        )
        assert_same_bits([x[one] for x in actual], alone)
        if q_len == 1:  # all of its keys are seen: no window is needed
            alone = santa.decode(q[one], *(x[one, KV_LEN - 300 :] for x in (k, v)), positions=kv_lens[one], **options)
            assert_same_bits([x[one].squeeze(1) for x in actual[:2]], alone)


@pytest.mark.parametrize("q_len", [None, 3])
def test_window_as_long_as_the_row_is_none(device, options, q_len):
    qkv, _ = problem("none", device, q_len=q_len)
    expected = santa.decode(*qkv, **options)
    for window_left in (KV_LEN - 1, KV_LEN, 2**31 - 1):
        assert_same_bits(santa.decode(*qkv, window_left=window_left, **options), expected)
    assert not torch.equal(santa.decode(*qkv, window_left=KV_LEN - 2, **options)[1], expected[1])


@pytest.mark.emulate
@pytest.mark.parametrize("q_len", [1, 2, 8])
def test_keys_before_the_window_are_never_read(device, options, q_len):
    """The first token's window begins where no other does before it: NaN in front of that changes no bit."""
    (q, k, v), _ = problem("none", device, q_len=q_len)
    expected = santa.decode(q, k, v, window_left=90, return_rows_read=True, **options)
    for x in (k, v):
        x[:, : KV_LEN - q_len - 90] = math.nan
    assert_same_bits(santa.decode(q, k, v, window_left=90, return_rows_read=True, **options), expected)
    assert expected[0].isfinite().all()
    k[:, KV_LEN - q_len - 90] = math.nan
    assert santa.decode(q, k, v, window_left=90, **options)[1].isnan().any()


def test_min_sampled_len_is_of_the_window(device):
    """A window of fewer keys takes the exact path, however long its row is."""
    qkv, _ = problem("none", device)
    options = {"num_samples": 8, "min_sampled_len": 101, "return_rows_read": True}
    exact = santa.decode(*qkv, window_left=99, **options | {"num_samples": 0})
    assert_same_bits(santa.decode(*qkv, window_left=99, **options), exact)
    sampled = santa.decode(*qkv, window_left=100, **options)
    assert (sampled[2] < 100).all() and (exact[2] == 100).all()


# Soft caps and sinks --------------------------------------------------------------------------------------


def test_no_soft_cap(device, options):
    """0 and None are none; a small one bounds the logits."""
    qkv, _ = problem("none", device)
    expected = santa.decode(*qkv, **options)
    assert_same_bits(santa.decode(*qkv, logits_soft_cap=0.0, **options), expected)
    _, flat = santa.decode(*qkv, logits_soft_cap=1e-3, **options)
    assert ((flat - math.log(KV_LEN)).abs() < 1.1e-3).all()


@pytest.mark.emulate
@pytest.mark.parametrize("cap", [20.0, 50.0, 1e3, 1e5, 1e30])
def test_far_soft_caps(device, cap):
    """The farther a cap is above the logits, the less it changes them, up to the largest that is taken."""
    qkv, _ = problem("none", device)
    _, lse = santa.decode(*qkv, num_samples=0, logits_soft_cap=cap)
    _, expected = oracle(qkv, {"logits_soft_cap": cap})
    torch.testing.assert_close(lse.double().cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.emulate
@pytest.mark.parametrize("q_len", [None, 3])
def test_sinks_change_no_draw(device, options, q_len):
    """They scale what comes out: by exp(lse without - lse with), whatever was drawn. A sink of -inf is none, to the
    bit; one that is far above all logits takes everything."""
    qkv, _ = problem("none", device, q_len=q_len)
    out, lse, rows = santa.decode(*qkv, return_rows_read=True, **options)
    none = torch.full((HEADS,), -math.inf, device=device)
    assert_same_bits(santa.decode(*qkv, sinks=none, return_rows_read=True, **options), (out, lse, rows))
    sinks = SINKS.to(device)
    sunk, sunk_lse, sunk_rows = santa.decode(*qkv, sinks=sinks, return_rows_read=True, **options)
    assert torch.equal(sunk_rows, rows)
    torch.testing.assert_close(sunk_lse, torch.logaddexp(lse, sinks.expand_as(lse)), rtol=1e-6, atol=1e-5)
    factor = (lse - sunk_lse).exp().unsqueeze(-1)
    rtol = 1e-5 if device == "cpu" else 2e-3
    torch.testing.assert_close(sunk.float(), out.float() * factor, rtol=rtol, atol=rtol / 10)
    all_of_it = torch.full((HEADS,), 1e4, device=device)
    sunk, sunk_lse = santa.decode(*qkv, sinks=all_of_it, **options)
    assert (sunk == 0).all() and torch.equal(sunk_lse, all_of_it.expand_as(sunk_lse))


@pytest.mark.sanitize
def test_sinks_of_rows_without_keys(device, options):
    """Zeros, and a log-sum-exp of the sink alone; so it is for tokens that see nothing."""
    (q, k, v), _ = problem("none", device, q_len=3)
    sinks = SINKS.to(device)
    for kv_len in (0, 2):
        out, lse = at_length((q[:1], k[:1], v[:1]), kv_len, sinks=sinks, **options)
        blind = 3 - kv_len
        assert (out[:, :blind] == 0).all() and out.isfinite().all()
        torch.testing.assert_close(lse[:, :blind], sinks.expand(1, blind, -1), rtol=1e-6, atol=1e-6)
    one_nan = sinks.clone()
    one_nan[3] = math.nan
    out, lse = santa.decode(q, k, v, sinks=one_nan, **options)
    assert out[:, :, 3].isnan().all() and lse[:, :, 3].isnan().all()
    assert out[:, :, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


# Heads of a larger model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len", [None, 2])
@pytest.mark.parametrize("kv_len", [700, 20000])
def test_heads_draw_what_they_draw_in_the_whole_model(device, options, q_len, kv_len):
    """Each half of the KV heads alone, as tensor parallelism has them: to the bit where a row is cut as in the whole
    model; parts of 20,000 keys are longer for more heads, which changes the order of sums."""
    tokens = 1 if q_len is None else q_len
    q, k, v = make_qkv(1, tokens * 8, 4, kv_len, 64, dtype=working_dtype(device), device=device, logit_std=2.0)
    if q_len is not None:
        q = q.unflatten(1, (q_len, 8))
    options |= {"sinks": torch.linspace(-1, 3, 8, device=device), "return_rows_read": True}
    whole = santa.decode(q, k, v, **options)
    for first in (0, 2):
        own = slice(2 * first, 2 * first + 4)
        halves = (q[..., own, :], *(x[:, :, first : first + 2] for x in (k, v)))
        out, lse, rows = santa.decode(
            *halves, **options | {"first_kv_head": first, "sinks": options["sinks"][own].contiguous()}
        )
        assert torch.equal(rows, whole[2][:, first : first + 2])
        expected = (whole[0][..., own, :], whole[1][..., own])
        if kv_len == 700:
            assert_same_bits((out, lse), expected)
        tolerance = 1e-5 if device == "cpu" else 2e-3
        torch.testing.assert_close((out, lse), expected, rtol=tolerance, atol=tolerance)
    if options["num_samples"] > 0:
        other = santa.decode(*halves, **options | {"first_kv_head": 0, "sinks": options["sinks"][4:].contiguous()})
        assert not torch.equal(other[0], whole[0][..., 4:, :]), "heads 2 and 3 do not draw what 0 and 1 would"


# Scales -------------------------------------------------------------------------------------------------


@pytest.mark.emulate
def test_numbers_as_scales(device, options):
    """A float, or an int, is a tensor of one."""
    (q, k, v), given = problem("numbers as scales", device)
    tensors = {n: torch.tensor([x], device=device) for n, x in given.items()}
    expected = santa.decode(q, k, v, **tensors, **options)
    assert_same_bits(santa.decode(q, k, v, **given, **options), expected)
    assert_same_bits(
        santa.decode(q, k, v, k_scale=1, v_scale=2, **options),
        santa.decode(q, k, v, v_scale=torch.tensor(2.0, device=device), **options),
    )
    for name in ("k_scale", "v_scale"):
        with pytest.raises(
            TypeError, match=f"^santa: {name} is a bool; it needs to be a torch.Tensor, a float or None$"
        ):
            santa.decode(q, k, v, **{name: True})
