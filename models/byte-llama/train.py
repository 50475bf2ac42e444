"""Train the byte-llama model from scratch and save it as a Hugging Face checkpoint.

    python models/byte-llama/train.py --minutes 7 --out models/byte-llama

The model is written out in plain PyTorch and computes what ``transformers.LlamaForCausalLM`` does
(``--check`` compares the two). Sequences grow from 1,024 to 16,384 bytes on a schedule of wall-clock
time, so the run ends on time on any GPU; how good the model is then depends on the GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tasks
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset


@dataclass(frozen=True)
class Config:
    """The model's shape, under the names Hugging Face's ``config.json`` uses."""

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 448
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0

    def to_json(self) -> dict[str, object]:
        """The contents of ``config.json``."""
        fields = asdict(self)
        theta = fields.pop("rope_theta")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **fields,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "bos_token_id": tasks.SEPARATOR,
            "eos_token_id": tasks.SEPARATOR,
            "use_cache": True,
            "dtype": "bfloat16",
        }


def rope_tables(config: Config, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [length, head_dim], each frequency once per half of the head."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), config.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., length, head_dim] by position; the two halves of the head are the pairs."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = apply_rope(q, cos, sin).to(v.dtype)
        k = apply_rope(k, cos, sin).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama with tied embeddings; parameter names are Hugging Face's without the ``model.`` prefix."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for name, weight in self.layers.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = rope_tables(self.config, tokens.shape[1], tokens.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def save_pretrained(model: Llama, folder: Path) -> None:
    """Write ``model.safetensors`` (bfloat16, tied head left out), config and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    generation = {"bos_token_id": tasks.SEPARATOR, "eos_token_id": tasks.SEPARATOR, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


class Stream(IterableDataset):
    """Endless training batches; every worker draws from its own random stream."""

    def __init__(self, text: np.ndarray, length: int, count: int, seed: int) -> None:
        self.text, self.length, self.count, self.seed = text, length, count, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, self.length, info.id if info else 0))
        while True:
            tokens, kinds = tasks.training_batch(self.text, self.length, self.count, rng)
            yield torch.from_numpy(tokens), torch.from_numpy(kinds)


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one sequence length, as a share of the run's time."""

    length: int
    batch: int
    share: float


def parse_phases(spec: str) -> list[Phase]:
    """Read ``"length x batch : share, ..."``, for example ``"1024x128:0.4,4096x32:0.6"``."""
    phases = []
    for item in spec.split(","):
        shape, share = item.split(":")
        length, batch = shape.split("x")
        phases.append(Phase(int(length), int(batch), float(share)))
    total = sum(phase.share for phase in phases)
    return [Phase(phase.length, phase.batch, phase.share / total) for phase in phases]


def learning_rate_factor(progress: float, warmup: float = 0.01, decay: float = 0.45) -> float:
    """Warm up, hold, then fall linearly to zero over the last ``decay`` of the run."""
    return max(0.0, min(1.0, progress / warmup, (1.0 - progress) / decay))


def loss_and_stats(model: nn.Module, tokens: Tensor, kinds: Tensor, answer_weight: float) -> tuple[Tensor, Tensor]:
    """The weighted training loss, and sums to log.

    Random bytes of key lines do not count, bytes of an answer count ``answer_weight`` times. The
    sums: text loss, text bytes, answer loss, right answer bytes, answer bytes.
    """
    logits = model(tokens[:, :-1]).flatten(0, 1).float()
    targets = tokens[:, 1:].flatten()
    kind = kinds[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none")
    is_text = (kind == tasks.KIND_TEXT).float()
    is_answer = (kind == tasks.KIND_ANSWER).float()
    weights = is_text + answer_weight * is_answer
    loss = (losses * weights).sum() / weights.sum()
    with torch.no_grad():
        right = (logits.argmax(-1) == targets).float() * is_answer
        stats = torch.stack(
            [
                (losses * is_text).sum(),
                is_text.sum(),
                (losses * is_answer).sum(),
                right.sum(),
                is_answer.sum(),
            ]
        )
    return loss, stats


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 on a GPU; few CPUs are faster with it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def heldout_bits(model: Llama, text: np.ndarray, length: int, limit: int = 1 << 18) -> float:
    """Bits per byte of the first held-out bytes, in windows of ``length``."""
    rows = min(len(text), limit) // (length + 1)
    if not rows:
        return math.nan
    tokens = torch.from_numpy(text[: rows * (length + 1)].astype(np.int64)).view(rows, length + 1)
    total = 0.0
    for row in tokens.to(model.embed_tokens.weight.device).split(1):
        # One shape more per length is not worth compiling for.
        with torch.compiler.set_stance("force_eager"), autocast(row.device):
            logits = model(row[:, :-1])
        total += F.cross_entropy(logits[0].float(), row[0, 1:], reduction="sum").item()
    return total / (rows * length) / math.log(2)


def train(args: argparse.Namespace, device: torch.device) -> Llama:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    corpus = tasks.load_corpus(args.corpus)
    print(
        f"text: {len(corpus.train):,} bytes in {len(corpus.train_files)} files; "
        f"held out: {len(corpus.heldout):,} bytes in {len(corpus.heldout_files)} files",
        flush=True,
    )
    model = Llama(Config()).to(device)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    on_gpu = device.type == "cuda"
    if on_gpu and args.compile:
        for layer in model.layers:
            layer.compile(dynamic=False)

    budget = args.minutes * 60
    phase_end = 0.0
    seen = steps = 0
    for phase in parse_phases(args.phases):
        phase_end += phase.share * budget
        stream = Stream(corpus.train, phase.length + 1, phase.batch, args.seed)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=args.workers,
            pin_memory=on_gpu,
            prefetch_factor=4 if args.workers else None,
        )
        print(f"-- length {phase.length}, batch {phase.batch}, until {phase_end:.0f} s", flush=True)
        totals = torch.zeros(5, device=device)
        mark, mark_seen = time.perf_counter(), seen
        for step, (tokens, kinds) in enumerate(loader, 1):
            elapsed = time.perf_counter() - start
            if elapsed >= phase_end:
                break
            factor = learning_rate_factor(elapsed / budget)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * factor
            tokens = tokens.to(device, non_blocking=True).long()
            kinds = kinds.to(device, non_blocking=True)
            with autocast(device):
                loss, stats = loss_and_stats(model, tokens, kinds, args.answer_weight)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            totals += stats
            steps += 1
            seen += phase.length * phase.batch
            if step == 1 or step % args.log_every == 0:
                # Reading the sums waits for the GPU, which also keeps the clock honest.
                text_loss, text_bytes, answer_loss, right, answer_bytes = totals.tolist()
                now = time.perf_counter()
                print(
                    f"{now - start:6.1f} s, step {steps}: text {text_loss / text_bytes / math.log(2):.3f} "
                    f"and answers {answer_loss / answer_bytes / math.log(2):.4f} bits/byte, "
                    f"{right / answer_bytes:.2%} of answer bytes right, "
                    f"{(seen - mark_seen) / (now - mark):,.0f} bytes/s",
                    flush=True,
                )
                totals.zero_()
                mark, mark_seen = now, seen
        del loader
        print(f"   held-out text: {heldout_bits(model, corpus.heldout, phase.length):.3f} bits/byte", flush=True)
    print(f"trained on {seen:,} bytes in {steps} steps and {time.perf_counter() - start:.0f} s", flush=True)
    return model


@torch.no_grad()
def check(model: Llama, folder: Path) -> None:
    """Compare this file's forward pass with ``transformers`` on the saved weights, in float32."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Llama(model.config)
    ours.load_state_dict({name: value.to("cpu", torch.bfloat16).float() for name, value in model.state_dict().items()})
    tokens = torch.randint(0, 256, (2, 333), generator=torch.Generator().manual_seed(0))
    gap = (ours(tokens) - theirs(tokens).logits).abs().max().item()
    print(f"largest difference from transformers' logits: {gap:.2e}")
    if not gap < 1e-3:
        raise SystemExit("the saved model does not reproduce the trained one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=7.0, help="wall-clock time of the whole run")
    parser.add_argument("--corpus", type=Path, help="read Python sources here, not from this interpreter")
    parser.add_argument(
        "--phases",
        default="1024x128:0.2,4096x32:0.2,8192x16:0.2,16384x8:0.4",
        help="LENGTHxBATCH:SHARE of the time, comma-separated",
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--answer-weight", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="processes that prepare batches")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile, on a GPU"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="compare the saved model with transformers")
    args = parser.parse_args()

    model = train(args, torch.device(args.device))
    save_pretrained(model, args.out)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"wrote {args.out / 'model.safetensors'}: {size:,} bytes")
    if args.check:
        check(model.cpu(), args.out)


if __name__ == "__main__":
    main()
