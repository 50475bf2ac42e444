"""Wrong arguments of proposal keys are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.errors import BATCH, HEAD_DIM, MAX_KV_LEN, NUM_KV_HEADS, empty, int32, paged, parts, qkv

import santa
from santa import ProposalKeys


def proposal_of(arguments: dict[str, torch.Tensor]) -> ProposalKeys:
    """Valid ones for k, or k_cache."""
    k = arguments.get("k", arguments.get("k_cache"))
    statistics = torch.ones(1, NUM_KV_HEADS, HEAD_DIM)
    return ProposalKeys(
        torch.zeros(*k.shape[:-1], HEAD_DIM // 2, dtype=torch.uint8),
        torch.zeros(k.shape[:-1], dtype=torch.float16),
        torch.zeros_like(statistics),
        statistics,
    )


def refused(match: str, error: type[Exception] = ValueError, *, arguments=None, **changed: Any) -> None:
    arguments = qkv() if arguments is None else arguments
    proposal = changed.pop("proposal") if "proposal" in changed else proposal_of(arguments)
    decode = santa.decode_paged if "k_cache" in arguments else santa.decode
    with pytest.raises(error, match=match):
        decode(**arguments | {"proposal": proposal} | changed)


CHANGES = {
    "codes": [
        (lambda x: x.to(torch.int8), "codes is int8; it needs to be uint8"),
        (lambda x: x[0], r"codes has shape \[300, 2, 32\]; it needs 4 dimensions, \[batch, max_kv_len"),
        (
            lambda x: x[:, :299],
            r"scales has shape \[2, 300, 2\]; dimension 1 \(as in codes\) is 300 and needs to be 299",
        ),
        (lambda x: x[..., :16], r"codes has shape .*dimension 3 \(head_dim / 2\) is 16 and needs to be 32"),
        (lambda x: x.repeat(1, 1, 1, 2)[..., ::2], "codes has stride 2 in its last dimension"),
        (lambda x: x.to("meta"), "codes is on .*; it needs to be on q's device, cpu"),
    ],
    "scales": [
        (lambda x: x.float(), "scales is float32; it needs to be float16"),
        (lambda x: x[0], r"scales has shape \[300, 2\]; it needs 3 dimensions"),
        (lambda x: x[:1], r"scales has shape .*dimension 0 \(as in codes\) is 1 and needs to be 2"),
        (lambda x: x.to("meta"), "scales is on .*; it needs to be on q's device, cpu"),
    ],
    "center": [
        (lambda x: x.half(), "center is float16; it needs to be float32"),
        (lambda x: x[0], r"center has shape .*; it needs 3 dimensions, \[batch or 1, num_kv_heads, head_dim\]"),
        (lambda x: x.expand(3, -1, -1).contiguous(), "center has shape .* is 3 and needs to be 1, or 2"),
        (lambda x: x[:, :1], r"center has shape .*dimension 1 \(num_kv_heads\) is 1 and needs to be 2"),
        (lambda x: x[..., :32], r"center has shape .*dimension 2 \(head_dim\) is 32 and needs to be 64"),
        (lambda x: x.expand(2, -1, -1), "center has strides .*; it needs to be contiguous"),
    ],
    "channel_scale": [
        (lambda x: x.double(), "channel_scale is float64; it needs to be float32"),
        (lambda x: x.repeat(2, 1, 1), r"channel_scale has .*dimension 0 \(as in center\) is 2 and needs to be 1"),
        (lambda x: x.to("meta"), "channel_scale is on .*; it needs to be on q's device, cpu"),
    ],
}


@pytest.mark.parametrize(
    "name, change, match", [(name, *change) for name, changes in CHANGES.items() for change in changes]
)
def test_tensors(name, change, match):
    proposal = proposal_of(qkv())
    refused("^santa: " + match, proposal=replace(proposal, **{name: change(getattr(proposal, name))}))


def test_codes_of_another_cache():
    proposal = proposal_of(qkv())
    shorter = replace(proposal, codes=proposal.codes[:, :299], scales=proposal.scales[:, :299])
    refused(r"santa: codes has shape .*dimension 1 \(as in k\) is 299 and needs to be 300", proposal=shorter)
    refused("santa: proposal has kv_layout 'NHD'; it needs to be 'HND', that of k", kv_layout="HND")
    refused("santa: kv_layout of proposal is 'xyz'", proposal=replace(proposal, kv_layout="xyz"))


def test_paged():
    arguments = paged()
    proposal = proposal_of(arguments)
    several = proposal.center.repeat(BATCH, 1, 1)
    refused(
        "santa: center has shape .* is 2 and needs to be 1: rows share pages, so they share center",
        arguments=arguments,
        proposal=replace(proposal, center=several, channel_scale=several),
    )
    fewer = replace(proposal, codes=proposal.codes[:19], scales=proposal.scales[:19])
    refused(
        r"santa: codes .*dimension 0 \(as in k_cache\) is 19 and needs to be 20", arguments=arguments, proposal=fewer
    )


@pytest.mark.parametrize(
    "options, match",
    [
        ({"sampler": "systematic"}, "sampler is 'systematic' with proposal keys, which need 'grouped'"),
        ({"sampler": "multinomial"}, "sampler is 'multinomial' with proposal keys, which need 'grouped'"),
        ({"budget": "uniform"}, "budget is 'uniform' with proposal keys, which need 'streaming'"),
        ({"budget": "proportional"}, "budget is 'proportional' with proposal keys, which need 'streaming'"),
        ({"score": "bernoulli"}, "proposal is given with score='bernoulli'; it needs score='exact'"),
        ({"levels": parts()["levels"]}, "levels is given with proposal keys, which are not for rows that are parts"),
        (parts(), "whole_lens is given with proposal keys, which are not for rows that are parts of longer ones"),
        ({"num_samples": -1}, "num_samples is -1"),
    ],
)
def test_options(options, match):
    refused("^santa: " + match, **options)


def test_types():
    refused("santa: proposal is a Tensor; it needs to be a santa.ProposalKeys or None", TypeError, proposal=empty(1))
    with pytest.raises(TypeError, match="santa: codes is a NoneType; it needs to be"):
        ProposalKeys(None, empty(1), empty(1), empty(1))
    with pytest.raises(TypeError, match="santa: proposal is a int; it needs to be"):
        santa.append_proposal_keys(3, empty(1), empty(1))
    with pytest.raises(TypeError, match="santa: k is a int; it needs to be"):
        santa.make_proposal_keys(3)


def k_of() -> torch.Tensor:
    return qkv()["k"]


ONES = torch.ones(1, NUM_KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize(
    "k, options, match",
    [
        (empty(3, 4), {}, r"k has shape \[3, 4\]; it needs 4 dimensions"),
        (empty(1, 5, 2, 80), {}, "k has head_dim 80; it needs to be one of 64, 96, 128, 192, 256"),
        (k_of().double(), {}, "k_new is float64; it needs to be bfloat16, float16, float32 or float8_e4m3fn"),
        (k_of(), {"kv_lens": int32([1])}, r"kv_lens has shape \[1\]; it needs to be \[2\], one for each row"),
        (k_of(), {"kv_starts": int32([1, 2, 3])}, r"kv_starts has shape \[3\]; it needs to be \[2\]"),
        (k_of(), {"page_table": int32([1])}, "kv_lens is None; page_table needs it"),
        (
            k_of(),
            {"page_table": int32([1]), "kv_lens": int32([1])},
            r"page_table has shape \[1\]; it needs to be \[batch",
        ),
        (k_of(), {"center": ONES}, "center is given without channel_scale; they need each other"),
        (k_of(), {"center": ONES, "channel_scale": ONES[..., :3]}, "channel_scale has shape"),
        (k_of(), {"kv_lens": int32([1, 2], "meta")}, "kv_lens is on meta; it needs to be on k's device, cpu"),
        (k_of(), {"kv_layout": "xyz"}, "kv_layout is 'xyz'"),
    ],
)
def test_make(k, options, match):
    with pytest.raises(ValueError, match="^santa: " + match):
        santa.make_proposal_keys(k, **options)


POSITIONS = torch.zeros(BATCH, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "k_new, places, match",
    [
        (k_of()[:, :3], {}, "positions and slots are both None; one of them is needed"),
        (k_of()[:, :3], {"positions": POSITIONS, "slots": POSITIONS}, "positions and slots are both given"),
        (k_of()[0], {"positions": POSITIONS}, r"k_new has shape .*; it needs 4 dimensions, \[batch, n, num_kv_heads"),
        (k_of()[:, :3, :1], {"positions": POSITIONS}, r"k_new has .*dimension 2 \(num_kv_heads of codes\) is 1"),
        (
            k_of()[:1, :3],
            {"positions": POSITIONS[:1]},
            r"k_new has .*dimension 0 \(batch of codes\) is 1 and needs to be 2",
        ),
        (k_of()[:, :2], {"positions": POSITIONS}, r"positions has .*dimension 1 \(n of k_new\) is 3 and needs to be 2"),
        (k_of()[:, :3], {"positions": POSITIONS[:1]}, r"positions has .*dimension 0 \(batch\) is 1 and needs to be 2"),
        (k_of()[:, :3], {"positions": POSITIONS[0]}, r"positions has shape \[3\]; it needs 2 dimensions, \[batch, n\]"),
        (k_of()[:, :3], {"positions": POSITIONS.float()}, "positions is float32; it needs to be int32 or int64"),
        (k_of()[:, :3], {"slots": POSITIONS.t().contiguous().t()}, "slots has strides .*; it needs to be contiguous"),
        (k_of()[..., :32], {"positions": POSITIONS}, "k_new has head_dim 32; it needs to be one of"),
        (k_of()[:, :3], {"positions": POSITIONS + MAX_KV_LEN}, "positions of row 0 has 300; it needs to be below 300"),
    ],
)
def test_append(k_new, places, match):
    proposal = proposal_of(qkv())
    with pytest.raises(ValueError, match="^santa: " + match):
        santa.append_proposal_keys(proposal, k_new, **places)
    assert not proposal.codes.any() and not proposal.scales.any()


def test_appending_has_no_derivative():
    proposal, k_new = proposal_of(qkv()), k_of()[:, :3].float().requires_grad_()
    with pytest.raises(
        RuntimeError, match="santa: append_proposal_keys has no backward pass and no forward derivative"
    ):
        santa.append_proposal_keys(proposal, k_new, POSITIONS)


@pytest.mark.parametrize("name", ["q", "k", "v", "center", "channel_scale"])
def test_backward_is_refused(name):
    arguments = qkv()
    proposal = proposal_of(arguments)
    if name in arguments:
        arguments[name].requires_grad_()
    else:
        getattr(proposal, name).requires_grad_()
    for output in (0, 1):
        result = santa.decode(**arguments, proposal=proposal, min_sampled_len=0)[output]
        with pytest.raises(RuntimeError, match="santa: decode_proposal has no backward pass"):
            result.sum().backward()


@pytest.mark.gpu
def test_rows_that_are_not_aligned():
    """CUDA copies 16 bytes at a time."""
    arguments = {name: x.cuda() for name, x in qkv().items()}
    proposal = proposal_of(qkv())
    proposal = ProposalKeys(**{name: x.cuda() for name, x in proposal.tensors().items()})
    for name in ("k", "v"):
        x = arguments[name]
        odd = torch.empty(*x.shape[:-1], HEAD_DIM + 1, dtype=x.dtype, device="cuda")[..., 1:]
        with pytest.raises(ValueError, match=f"{name} has rows that do not start on 16-byte boundaries"):
            santa.decode(**arguments | {name: odd}, proposal=proposal)
