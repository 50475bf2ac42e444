"""Heads spread over two ranks: each decodes its own, with the draws that one process makes for them."""

import torch

import santa

q, k, v = torch.randn(2, 32, 128), *torch.randn(2, 2, 24576, 8, 128)  # 32 query and 8 KV heads, the whole model's
options = {"num_samples": 128, "seed": 1}
whole, _ = santa.decode(q, k, v, **options)
for rank in range(2):
    kv_heads, heads = slice(4 * rank, 4 * rank + 4), slice(16 * rank, 16 * rank + 16)  # that the rank has
    out, _ = santa.decode(q[:, heads], k[:, :, kv_heads], v[:, :, kv_heads], first_kv_head=4 * rank, **options)
    difference = (out - whole[:, heads]).abs().max().item()
    assert difference < 1e-5  # the same draws; sums over other parts of a row round differently
    print(f"rank {rank}, query heads {heads.start} to {heads.stop - 1}: differs from one process by {difference:.1e}")
