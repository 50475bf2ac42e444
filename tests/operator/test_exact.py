"""The exact path: num_samples=0, and rows below min_sampled_len."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.inputs import HEAD_DIMS, dtypes_of, make_qkv
from helpers.statistics import relative_rms

import santa
from santa import reference


def sdpa(q, k, v, sm_scale=None):
    """Same-dtype PyTorch attention on HND inputs."""
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=sm_scale, enable_gqa=True).squeeze(2)


def assert_as_accurate_as_torch(q, k, v, out, lse, sm_scale=None):
    """Error against float64 at most twice that of same-dtype PyTorch (k, v in HND)."""
    expected, expected_lse = reference.exact(q.cpu(), k.cpu(), v.cpu(), kv_layout="HND", sm_scale=sm_scale)
    ours = relative_rms(out, expected)
    theirs = relative_rms(sdpa(q, k, v, sm_scale), expected)
    assert ours <= 2 * theirs + 1e-7, f"santa {ours:.2e}, torch {theirs:.2e}"
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 7, 8, 9, 16])
def test_error_at_most_twice_torch(device, head_dim, group_size):
    for dtype in dtypes_of(device):
        q, k, v = make_qkv(2, 2 * group_size, 2, 700, head_dim, dtype=dtype, device=device, layout="HND")
        out, lse = santa.decode(q, k, v, num_samples=0, kv_layout="HND")
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert_as_accurate_as_torch(q, k, v, out, lse)


@pytest.mark.sanitize
@pytest.mark.parametrize("group_size", [3, 6, 10, 11, 12, 13, 14, 15, 24, 40])
def test_other_group_sizes(device, group_size):
    dtype = torch.bfloat16
    q, k, v = make_qkv(1, group_size, 1, 333, 64, dtype=dtype, device=device, layout="HND")
    out, lse = santa.decode(q, k, v, num_samples=0, kv_layout="HND")
    assert_as_accurate_as_torch(q, k, v, out, lse)


@pytest.mark.parametrize("kv_len", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 4095, 4096, 4097, 16385])
def test_lengths_around_tile_boundaries(device, kv_len):
    q, k, v = make_qkv(1, 4, 1, kv_len, 64, dtype=torch.float16, device=device, layout="HND")
    out, lse = santa.decode(q, k, v, num_samples=0, kv_layout="HND")
    assert_as_accurate_as_torch(q, k, v, out, lse)


@pytest.mark.parametrize("logit_std", [4.0, 16.0])
def test_peaked_distributions(device, logit_std):
    q, k, v = make_qkv(2, 8, 2, 1500, 128, dtype=torch.bfloat16, device=device, layout="HND", logit_std=logit_std)
    out, lse = santa.decode(q, k, v, num_samples=0, kv_layout="HND")
    assert_as_accurate_as_torch(q, k, v, out, lse)


@pytest.mark.parametrize("sm_scale", [0.0, 0.3, -0.05])
def test_sm_scale(device, sm_scale):
    q, k, v = make_qkv(1, 8, 2, 500, 64, dtype=torch.float16, device=device, layout="HND")
    out, lse = santa.decode(q, k, v, num_samples=0, kv_layout="HND", sm_scale=sm_scale)
    assert_as_accurate_as_torch(q, k, v, out, lse, sm_scale)


@pytest.mark.sanitize
def test_rows_below_min_sampled_len_are_exact(device):
    """A row one key short of the bound takes the exact path to the bit; the row at the bound is sampled."""
    q, k, v = make_qkv(2, 8, 2, 600, 64, dtype=torch.float16, device=device)
    kv_lens = torch.tensor([599, 600], dtype=torch.int32, device=device)
    exact, _, _ = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=0, return_rows_read=True)
    out, _, rows = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=16, min_sampled_len=600, return_rows_read=True)
    assert torch.equal(out[0], exact[0]) and rows[0].tolist() == [599, 599]
    assert not torch.equal(out[1], exact[1]) and (rows[1] <= 80).all()


def test_default_min_sampled_len(device):
    """The documented rule decides when min_sampled_len is None."""
    bound = santa.default_min_sampled_len(64, 4)
    assert bound == 8192 and santa.default_min_sampled_len(2048, 4) == 32768
    q, k, v = make_qkv(2, 4, 1, bound, 64, dtype=torch.float16, device=device)
    kv_lens = torch.tensor([bound - 1, bound], dtype=torch.int32, device=device)
    _, _, rows = santa.decode(q, k, v, kv_lens=kv_lens, num_samples=64, return_rows_read=True)
    assert rows[0].item() == bound - 1 and rows[1].item() <= 256
