"""The emulator itself: calls get to it, and what goes wrong in a kernel is an error of the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import emulator

import santa

LIBRARY = emulator.build()
if isinstance(LIBRARY, str):
    pytest.skip(LIBRARY, allow_module_level=True)


def every_operator() -> dict[str, Callable[[], object]]:
    """A call of each operator that has kernels."""
    q = torch.ones(1, 2, 64, dtype=torch.float16)
    rows = torch.ones(1, 40, 1, 64, dtype=torch.float16)  # [batch, kv_len, num_kv_heads, head_dim]
    table, places = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    pages: dict[str, Any] = {"page_table": table, "kv_lens": places + 30}
    features = rows.permute(0, 2, 3, 1).contiguous()
    proposal, sampled = santa.make_proposal_keys(rows), {"num_samples": 4, "min_sampled_len": 0}
    tokens = rows.transpose(1, 2)
    units = torch.ones(1, 1, 128, dtype=torch.int32)
    seeds, ops = torch.zeros(1, dtype=torch.int64), torch.ops.santa
    return {
        "decode": lambda: santa.decode(q, rows, rows, **sampled),
        "decode, out": lambda: santa.decode(q, rows, rows, out=torch.empty_like(q), lse=torch.empty(1, 2)),
        "decode_paged": lambda: santa.decode_paged(q, rows[:, :32], rows[:, :32], **pages, **sampled),
        "decode_proposal": lambda: santa.decode(q, rows, rows, proposal=proposal, **sampled),
        "append_proposal_keys": lambda: santa.append_proposal_keys(proposal, rows[:, :1], places[:, None]),
        "decode_bernoulli": lambda: santa.decode(q, features, rows, score="bernoulli", **sampled),
        "append_k_features": lambda: santa.append_k_features(features, rows[:, :1], places),
        "append_k_features_paged": lambda: santa.append_k_features_paged(features, rows[:, :1], places, table),
        "sample_select": lambda: ops.sample_select(tokens, tokens),
        "_select": lambda: ops._select(seeds[:, None] + 128, units, seeds, 4, 2, 0),
        "_draw": lambda: ops._draw(units, seeds, 8, 0),
        "_ternary_counts": lambda: ops._ternary_counts(q, places + 40, seeds, 1, 4, 0, 0),
    }


@pytest.mark.parametrize("name", every_operator())
def test_every_operator_is_led_to_kernels(name: str) -> None:
    """Without which tests marked `emulate` would be of the CPU backend."""
    assert not isinstance(LIBRARY, str)
    call, before = every_operator()[name], emulator.num_launches(LIBRARY)
    call()
    assert emulator.num_launches(LIBRARY) == before
    with emulator.device(LIBRARY):
        call()
    assert emulator.num_launches(LIBRARY) > before


def test_threads_that_never_run_are_found() -> None:
    """Every other thread alone gets its turn here."""
    assert not isinstance(LIBRARY, str)
    call = every_operator()["decode"]
    with emulator.device(LIBRARY, order=2), pytest.raises(RuntimeError, match="emulator: all threads wait"):
        call()
