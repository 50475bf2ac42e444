"""Prompt lookup in Transformers: speculated tokens are verified by sampled attention, up to 8 in one step."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import santa
from santa.integrations.transformers import attach, record_rows_read

sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).eval()  # stands for a model of yours
prompt = torch.randint(1000, (1, 150)).repeat(1, 2)  # repeats itself: there is something to look up
for most in (1, 8):  # by default verification is exact
    attach(model, santa.SantaConfig(num_samples=16, min_sampled_len=100, max_sampled_q_len=most))
    with record_rows_read(model) as record:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, prompt_lookup_num_tokens=7)
    steps = len(record.rows_read[0])
    print(f"max_sampled_q_len {most}: {steps} sampled steps, which read {record.share():.0%} of V")
