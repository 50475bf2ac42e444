"""Decode over a cache in three pieces (devices, tiers, a shared prefix) and merge: attention over all keys."""

import torch

import santa

q = torch.randn(2, 32, 128)  # [batch, num_qo_heads, head_dim]
k, v = torch.randn(2, 2, 24576, 8, 128)  # [batch, kv_len, num_kv_heads, head_dim]
v += 1.0
pieces = [slice(0, 2048), slice(2048, 12288), slice(12288, 24576)]

# Short pieces are exact, longer ones are sampled; lse is exact in both. A seed for each piece: errors are independent.
states = [santa.decode(q, k[:, piece], v[:, piece], num_samples=128, seed=i) for i, piece in enumerate(pieces)]
outs, lses = (torch.stack(tensors, dim=1) for tensors in zip(*states, strict=True))
out, lse = santa.merge_states(outs, lses)

exact, exact_lse = santa.decode(q, k, v, num_samples=0)
print(f"lse is off by {(lse - exact_lse).abs().max():.1e}, out by {(out - exact).norm() / exact.norm():.1%}")
