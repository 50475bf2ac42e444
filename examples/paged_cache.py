"""A paged cache by block table, and then the keys that a selection method has left of a row, as pages of one key."""

import torch

import santa

q = torch.randn(2, 8, 64)  # [batch, num_qo_heads, head_dim]
k_cache, v_cache = torch.randn(2, 64, 16, 2, 64)  # [num_pages, page_size, num_kv_heads, head_dim]
v_cache += 1.0
block_table = torch.randperm(64).int().view(2, 32)  # [batch, max_pages]
kv_lens = torch.tensor([512, 300], dtype=torch.int32)
exact, lse = santa.decode_paged(q, k_cache, v_cache, page_table=block_table, kv_lens=kv_lens, num_samples=0)

kept = torch.randperm(300)[:200].sort().values  # of row 1, by whatever method
slots = (block_table[1, kept // 16] * 16 + kept % 16).int()
pages = {"kv_indices": slots, "kv_indptr": torch.tensor([0, 200]).int(), "kv_last_page_len": torch.tensor([1]).int()}
keys, values = (x.view(1024, 1, 2, 64) for x in (k_cache, v_cache))
out, _ = santa.decode_paged(q[1:], keys, values, **pages)
print(f"200 of 300 keys, at random, move the output by {(out - exact[1:]).norm() / exact[1:].norm():.0%}")
