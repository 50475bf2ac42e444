"""Decode as Gemma 2, Mistral and gpt-oss have it: soft-capped logits, a sliding window, attention sinks."""

import torch

import santa

q = torch.randn(1, 8, 64)  # [batch, num_qo_heads, head_dim]
k, v = torch.randn(2, 1, 4096, 2, 64)  # [batch, kv_len, num_kv_heads, head_dim]
v += 1.0
features = {
    "soft cap": {"logits_soft_cap": 30.0},
    "window": {"window_left": 1023},  # the token's own key and 1,023 before it
    "sinks": {"sinks": torch.randn(8)},  # a logit for each head, without a value
}
for name, options in features.items():
    exact, _ = santa.decode(q, k, v, num_samples=0, **options)
    many = (x.expand(200, *x.shape[1:]) for x in (q, k, v))  # 200 estimates in one batch
    out, _ = santa.decode(*many, num_samples=64, min_sampled_len=0, row_seeds=torch.arange(200), **options)
    one, mean = ((x - exact[0]).norm() / exact.norm() for x in (out[0], out.mean(0)))
    print(f"{name}: one estimate errs by {one:.0%}, the mean of 200 by {mean:.1%}")
