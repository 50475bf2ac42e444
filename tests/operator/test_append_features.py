"""Filling the feature-major key cache: append_k_features and append_k_features_paged."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import working_dtype

import santa

pytestmark = pytest.mark.emulate


@pytest.mark.sanitize
@pytest.mark.parametrize("num_rows", [1, 7, 100])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_append(device, num_rows, index_dtype):
    """A transposition, at each row's own position, that touches nothing else; of k_new with any strides."""
    generator = torch.Generator().manual_seed(num_rows)
    for head_dim, dtype in ((64, torch.float16), (96, torch.bfloat16), (40, working_dtype(device))):
        new = torch.randn(3, 2, num_rows, head_dim + 3, generator=generator).to(device, dtype)
        new = new.transpose(1, 2)[..., 1 : head_dim + 1]
        storage = torch.randn(3, 4, head_dim, 137, generator=generator).to(device, dtype)
        k = storage[:, 1:3, :, 2:133]
        expected = storage.clone()
        positions = torch.tensor([0, 13, 131 - num_rows], dtype=index_dtype, device=device)
        for b, position in enumerate(positions.tolist()):
            expected[b, 1:3, :, 2 + position : 2 + position + num_rows] = new[b].permute(1, 2, 0)
        santa.append_k_features(k, new, positions)
        assert torch.equal(storage, expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("num_rows", [1, 50])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_append_paged(device, num_rows, page_size):
    """Positions go through the block table, whose entries are in no order."""
    generator = torch.Generator().manual_seed(page_size)
    dtype = working_dtype(device)
    max_pages = -(-130 // page_size)
    table = torch.randperm(2 * max_pages + 5, generator=generator)[: 2 * max_pages].reshape(2, max_pages).int()
    pages = torch.randn(2 * max_pages + 5, 2, 64, page_size, generator=generator).to(device, dtype)
    new = torch.randn(2, num_rows, 2, 64, generator=generator).to(device, dtype)
    positions = torch.tensor([3, 77], device=device)
    expected = pages.clone()
    for b, first in enumerate(positions.tolist()):
        for n in range(num_rows):
            page, offset = divmod(first + n, page_size)
            expected[table[b, page], :, :, offset] = new[b, n]
    table[0, -1] = 10**6  # not needed, not looked at
    santa.append_k_features_paged(pages, new, positions, table.to(device))
    assert torch.equal(pages, expected)


@pytest.mark.sanitize
def test_append_without_room(device):
    """On the CPU an error, before anything is written; on CUDA such a row stays as it is."""
    k = torch.zeros(2, 2, 64, 50, dtype=working_dtype(device), device=device)
    new = torch.ones(2, 4, 2, 64, dtype=k.dtype, device=device)
    table = torch.tensor([[0, 9], [1, 0]], dtype=torch.int32, device=device)
    for positions in ([0, 47], [0, -1], [0, 2**40]):
        positions = torch.tensor(positions, device=device)
        if device == "cpu":
            with pytest.raises(ValueError, match="positions of row 1 is"):
                santa.append_k_features(k, new, positions)
            assert (k == 0).all()
        else:
            santa.append_k_features(k, new, positions)
            assert (k[1] == 0).all() and (k[0, ..., :4] == 1).all()
    pages = torch.zeros(2, 2, 64, 16, dtype=k.dtype, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="block_table of row 0 has a page outside"):
            santa.append_k_features_paged(pages, new, torch.tensor([14, 0]), table)
        assert (pages == 0).all()
    else:
        santa.append_k_features_paged(pages, new, torch.tensor([14, 0], device=device), table)
        assert (pages[0, ..., 14:] == 1).all() and (pages[0, ..., :14] == 0).all() and (pages[1, ..., :4] == 1).all()


@pytest.mark.sanitize
def test_append_errors(device):
    k = torch.zeros(2, 2, 64, 50, dtype=working_dtype(device), device=device)
    new, positions = torch.ones(2, 4, 2, 64, dtype=k.dtype, device=device), torch.tensor([0, 1], device=device)
    other = torch.float16 if k.dtype != torch.float16 else torch.bfloat16
    for message, inputs in (
        ("k_new is .*; it needs to be .*, the dtype of k_features", (k, new.to(other), positions)),
        (r"k_new has shape \[2, 4, 1, 64\]; dimension 2 \(num_kv_heads\)", (k, new[:, :, :1], positions)),
        (r"positions has shape \[1\]", (k, new, positions[:1])),
        ("positions is float32", (k, new, positions.float())),
        ("k_new has 51 rows; k_features has room for 50", (k, new[:, :1].expand(2, 51, 2, 64), positions)),
        (
            "k_features has stride 64 in its last dimension",
            (k.transpose(2, 3).contiguous().transpose(2, 3), new, positions),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            santa.append_k_features(*inputs)
    pages, table = torch.zeros(5, 2, 64, 16, dtype=k.dtype, device=device), torch.zeros(2, 2, device=device)
    with pytest.raises(ValueError, match=r"block_table is int64; it needs to be int32: pass block_table\.to\(torch"):
        santa.append_k_features_paged(pages, new, positions, table.long())
    with pytest.raises(RuntimeError, match="cannot run under vmap"):
        torch.func.vmap(santa.append_k_features)(*(torch.stack([x, x]) for x in (k, new, positions)))
    with pytest.raises(RuntimeError, match="no backward pass"):
        santa.append_k_features(k, new.requires_grad_(), positions)
