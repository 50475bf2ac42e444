"""quantize_kv: its scales, its rounding and its errors."""

from __future__ import annotations

import pytest
import torch
from helpers.float8 import FLOAT8, LAYOUTS, heads_apart, quantised
from helpers.inputs import make_qkv
from helpers.statistics import relative_rms

import santa


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_kv(device, layout, per_head):
    """The largest magnitude becomes 448; no element is further off than half a unit of float8."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _, k, _ = make_qkv(2, 6, 3, 200, 64, dtype=dtype, device=device, layout=layout)
        k = heads_apart(k, layout)
        heads = k.transpose(1, 2) if layout == "NHD" else k
        x, scale = santa.quantize_kv(k, per_head=per_head, kv_layout=layout)
        assert x.dtype == FLOAT8 and x.shape == k.shape and x.device == k.device
        assert scale.dtype == torch.float32 and scale.shape == ((3,) if per_head else ())
        amax = heads.abs().amax((0, 2, 3)) if per_head else heads.abs().max()
        torch.testing.assert_close(scale, amax.float() / 448, rtol=1e-6, atol=0)
        x = x.transpose(1, 2) if layout == "NHD" else x
        assert (x.float().abs().amax((0, 2, 3) if per_head else None) == 448).all()
        steps = scale.double().view(-1, 1, 1)
        error = (x.double() * steps - heads.double()).abs()
        assert (error <= torch.maximum(heads.double().abs() / 16, steps / 1024) * (1 + 1e-6)).all()


def test_quantize_kv_of_what_has_no_scale(device):
    """Zeros have the scale 1, and one zero head does not touch the others; tiny and huge numbers stay finite."""
    x = torch.randn(1, 5, 3, 64, device=device)
    x[:, :, 1] = 0.0
    x_fp8, scale = santa.quantize_kv(x)
    assert scale[1] == 1 and (x_fp8[:, :, 1].float() == 0).all()
    assert torch.equal(x_fp8[:, :, 2:].float(), santa.quantize_kv(x[:, :, 2:])[0].float())
    for magnitude in (1e-45, 1e-40, 1e-37, 3e38):
        x_fp8, scale = santa.quantize_kv(torch.full((1, 5, 1, 64), magnitude, device=device))
        back = x_fp8.double() * scale.double()
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert (back - magnitude).abs().max() <= max(magnitude / 16, scale.item() / 1024)
    for shape in ((2, 0, 3, 64), (0, 5, 3, 64)):
        x_fp8, scale = santa.quantize_kv(torch.zeros(shape, device=device))
        assert x_fp8.shape == shape and scale.tolist() == [1, 1, 1]
    x[0, 0, 0, 0] = float("nan")
    x_fp8, scale = santa.quantize_kv(x)
    assert scale.isnan().tolist() == [True, False, False] and x_fp8[:, :, 0].isnan().all()


def test_quantize_kv_errors():
    x = torch.zeros(1, 5, 2, 64)
    for argument, error, match in [
        ([1.0], TypeError, r"santa: x is a list; it needs to be a torch\.Tensor"),
        (x[0], ValueError, r"santa: x has shape \[5, 2, 64\]; it needs 4 dimensions, .*"),
        (x.double(), ValueError, r"santa: x is float64; it needs to be bfloat16, float16 or float32"),
        (x.to(FLOAT8), ValueError, r"santa: x is float8_e4m3fn; it needs to be bfloat16, float16 or float32"),
    ]:
        with pytest.raises(error, match=match):
            santa.quantize_kv(argument)
    with pytest.raises(ValueError, match=r"santa: kv_layout is 'HDN'; it needs to be one of 'NHD', 'HND' .*"):
        santa.quantize_kv(x, kv_layout="HDN")


def test_error_of_the_rounding():
    """A rounded number is off by about 2.6% (rms), so each logit of standard deviation 1 by 0.026, and the sums over
    keys and over values by as much. Errors add up in squares: 3.7% with both."""
    q, k, v = make_qkv(4, 8, 2, 4096, 128)
    v = v - 1.0
    exact, exact_lse = santa.decode(q, k, v, num_samples=0)
    for kind, expected in (("fp8-k", 0.026), ("fp8", 0.037)):
        k8, v8, scales = quantised(kind, k, v)
        out, lse = santa.decode(q, k8, v8, num_samples=0, **scales)
        assert expected / 1.2 < relative_rms(out, exact) < expected * 1.2
        assert (lse - exact_lse).abs().max() < 0.005
