"""Continuous batching in Transformers, decode steps sampled: prompts of any length, more of them than fit at once."""

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import santa
from santa.integrations.transformers import attach, record_rows_read

sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).eval()  # stands for a model of yours
attach(model, santa.SantaConfig(num_samples=16, min_sampled_len=100), paged=True)  # generate needs paged=False
prompts = [torch.randint(1000, (length,)).tolist() for length in (600, 30, 300)]
greedy = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=256)  # a prompt of 600 tokens comes in chunks
with record_rows_read(model) as record:
    outputs = model.generate_batch(prompts, greedy, room)
for name, output in sorted(outputs.items()):
    print(name, output.generated_tokens, f"{record.share():.0%} of V read")
