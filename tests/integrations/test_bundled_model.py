"""The bundled byte-llama model: its files, the samplers on its attention, and its answers under sampled decoding.

Gaussian inputs have no attention sinks, no matching key far back and no correlated heads. Here q, k and v are those of
a trained model at a context of 8192, for a held-out text and for a retrieval prompt whose answer is being predicted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.inputs import SAMPLERS
from helpers.statistics import Z_LARGEST, Z_PROJECTED, mean_z
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.4.0")

import evaluate  # noqa: E402
import tasks  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

import santa  # noqa: E402
from santa import SantaConfig, reference  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "models" / "byte-llama"

CONTEXT = 8192
NUM_KV_HEADS, GROUP, HEAD_DIM, NUM_LAYERS = 2, 4, 64, 6
NUM_POSITIONS = 4  # queries per text and layer: the last ones


def test_files_are_what_the_card_says():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    weights = MODEL / "model.safetensors"
    config = json.loads((MODEL / "config.json").read_text())
    model, info = LlamaForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(info.values()), info
    size = weights.stat().st_size
    assert size <= 8 << 20 and f"{size:,} bytes" in card
    assert f"| parameters | {model.num_parameters():,}, stored in {config['dtype']} |" in card
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    assert group >= 4 and config["head_dim"] == 64 and config["max_position_embeddings"] >= CONTEXT
    assert (config["num_hidden_layers"], config["num_key_value_heads"], group) == (NUM_LAYERS, NUM_KV_HEADS, GROUP)
    attention = f"{config['num_attention_heads']} query heads, {config['num_key_value_heads']} KV heads"
    assert f"| attention | {attention} (GQA group of {group}), head size 64 |" in card
    assert f"{config['max_position_embeddings']:,} positions" in card
    assert f"| vocabulary | {config['vocab_size']} bytes |" in card
    sizes = [config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    assert "| layers, hidden size, MLP size | {}, {}, {} (SwiGLU) |".format(*sizes) in card
    cache = 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * model.dtype.itemsize
    assert f"| KV cache | {cache:,} bytes per position in bfloat16 |" in card


@dataclass
class Layer:
    """Attention of one layer for the last NUM_POSITIONS queries of one text; position i sees kv_lens[i] keys."""

    text: str
    index: int
    q: Tensor  # [positions, num_qo_heads, head_dim]
    k: Tensor  # [1, num_kv_heads, kv_len, head_dim]
    v: Tensor  # [1, num_kv_heads, kv_len, head_dim]
    kv_lens: Tensor  # int32 [positions]
    sm_scale: float

    def exact(self) -> Tensor:
        """float64 [positions, num_kv_heads, group, head_dim]."""
        options = dict(kv_lens=self.kv_lens, kv_layout="HND", sm_scale=self.sm_scale)
        keys, values = (x.expand(len(self.q), -1, -1, -1) for x in (self.k, self.v))
        return reference.exact(self.q, keys, values, **options)[0].unflatten(1, (NUM_KV_HEADS, GROUP))

    def draws(self, count: int, num_samples: int, sampler: str) -> tuple[Tensor, Tensor]:
        """`count` independent estimates per position: float64 [positions, count, num_kv_heads, group, head_dim], and
        V rows read, float64 [positions, count, num_kv_heads]."""
        rows = len(self.q) * count
        out, _, rows_read = santa.decode(
            self.q.repeat_interleave(count, 0),
            self.k.expand(rows, -1, -1, -1),
            self.v.expand(rows, -1, -1, -1),
            kv_lens=self.kv_lens.repeat_interleave(count),
            num_samples=num_samples,
            sampler=sampler,
            kv_layout="HND",
            sm_scale=self.sm_scale,
            seed=2 * self.index + (self.text == "text"),
            row_seeds=torch.arange(rows),
            min_sampled_len=0,
            return_rows_read=True,
        )
        out = out.double().view(len(self.q), count, NUM_KV_HEADS, GROUP, HEAD_DIM)
        return out, rows_read.double().view(len(self.q), count, NUM_KV_HEADS)


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    """Every layer's attention in one prefill of a held-out text and of a retrieval prompt with most of its answer."""
    captured: list[Layer] = []
    texts = ("text", "retrieval")

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float, **kwargs: Any
    ) -> Any:
        kv_len = key.shape[2]
        for row, name in enumerate(texts):
            q = query[row, :, -NUM_POSITIONS:].transpose(0, 1).contiguous()
            kv_lens = torch.arange(kv_len - NUM_POSITIONS + 1, kv_len + 1, dtype=torch.int32)
            k, v = key[row : row + 1].clone(), value[row : row + 1].clone()
            captured.append(Layer(name, module.layer_idx, q, k, v, kv_lens, scaling))
        return sdpa_attention_forward(module, query, key, value, *args, scaling=scaling, **kwargs)

    AttentionInterface.register("santa_test_capture", capture)
    AttentionMaskInterface.register("santa_test_capture", sdpa_mask)
    model = evaluate.load_model(device="cpu", attn="santa_test_capture")
    heldout = tasks.load_corpus().heldout
    prompts, answers = tasks.retrieval_batch(CONTEXT, 1, seed=0, text=heldout)
    # Without its last byte: the last queries are then those that predict the answer.
    retrieval = torch.cat((prompts, answers), dim=1)[:, :-1]
    text = torch.from_numpy(heldout[: CONTEXT - 1].astype(np.int64))[None]
    with torch.inference_mode():
        model(torch.cat((text, retrieval)), use_cache=False, logits_to_keep=1)
    assert len(captured) == len(texts) * NUM_LAYERS
    return captured


def test_grouped_beats_systematic_on_real_attention(layers):
    """RMSE of grouped over that of systematic at equally many distinct V rows read (log-log interpolation), as the
    geometric mean over texts, layers and KV heads. It is 0.70, and over 8 seeds its logarithm had a standard deviation
    of 0.002: by chance a change of seed fails this far less than once in 1e9 times. Three
    other pairs of texts gave 0.70 to 0.71."""
    count, ratios, compared = 16, {}, 0
    for layer in layers:
        exact = layer.exact()[:, None]
        curves = {}
        for sampler in ("systematic", "grouped"):
            points = []
            for num_samples in (8, 16, 32, 64, 128, 256):
                out, rows = layer.draws(count, num_samples, sampler)
                mse = (out - exact).pow(2).mean(dim=(0, 1, 3, 4))
                points.append(torch.stack((rows.mean(dim=(0, 1)).log(), mse.log() / 2)))
            curves[sampler] = torch.stack(points, dim=-1).numpy()  # [rows or rmse, num_kv_heads, points]
        for head in range(NUM_KV_HEADS):
            grouped_rows, grouped_rmse = curves["grouped"][:, head]
            rows, rmse = curves["systematic"][:, head]
            inside = (rows >= grouped_rows[0]) & (rows <= grouped_rows[-1])
            assert inside.sum() >= 3, (layer.text, layer.index, head, rows, grouped_rows)
            log_ratio = np.interp(rows[inside], grouped_rows, grouped_rmse) - rmse[inside]
            ratios[layer.text, layer.index, head] = math.exp(log_ratio.mean())
            compared += 1
    aggregate = math.exp(np.log(list(ratios.values())).mean())
    report = [f"{text}, layer {index}, KV head {head}: {ratio:.3f}" for (text, index, head), ratio in ratios.items()]
    assert compared == 2 * NUM_LAYERS * NUM_KV_HEADS
    assert aggregate < 1.0, f"grouped / systematic RMSE {aggregate:.3f}\n" + "\n".join(report)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unbiased_on_real_attention(layers, sampler):
    """The mean of the draws is exact attention in every layer and KV head, and the same test sees a bias of 1%.

    Each problem (text, layer, KV head) gives a z statistic; their sum over the root of their number is one too, and
    sees a bias that all share. One of the 24 is beyond Z_LARGEST by chance with probability 5e-8; Student's t of 256
    draws makes it 2e-7."""
    single, biased = [], []
    for layer in layers:
        last = Layer(layer.text, layer.index, layer.q[-1:], layer.k, layer.v, layer.kv_lens[-1:], layer.sm_scale)
        out, _ = last.draws(256, 16, sampler)
        exact = last.exact()[0]
        for head in range(NUM_KV_HEADS):
            single.append(mean_z(out[0, :, head], exact[head])[0])
            biased.append(mean_z(out[0, :, head] * 1.01, exact[head])[0])
    root = len(single) ** 0.5
    assert abs(sum(single)) / root < Z_PROJECTED, single
    assert max(map(abs, single)) < Z_LARGEST, single
    assert sum(biased) / root > Z_PROJECTED, "the test could not see a bias of 1%"


def test_float8_on_real_attention(layers):
    """Relative error of exact attention over K, and over K and V, in float8 with a scale per head, for each text and
    layer: docs/float8.md gives these numbers. It is no larger than the noise of S = 64 in the geometric mean."""
    errors: dict[str, list[float]] = {"fp8-k": [], "fp8": [], "S = 64": [], "S = 256": []}
    for layer in layers:
        exact = layer.exact()
        k8, k_scale = santa.quantize_kv(layer.k, kv_layout="HND")
        v8, v_scale = santa.quantize_kv(layer.v, kv_layout="HND")
        caches = {"fp8-k": (k8, layer.v, k_scale, None), "fp8": (k8, v8, k_scale, v_scale)}
        for name, (k, v, *scales) in caches.items():
            out, _ = santa.decode(
                layer.q,
                k.expand(len(layer.q), -1, -1, -1),
                v.expand(len(layer.q), -1, -1, -1),
                kv_lens=layer.kv_lens,
                num_samples=0,
                kv_layout="HND",
                sm_scale=layer.sm_scale,
                k_scale=scales[0],
                v_scale=scales[1],
            )
            errors[name].append(float((out.view_as(exact) - exact).norm() / exact.norm()))
        for num_samples in (64, 256):
            out, _ = layer.draws(16, num_samples, "grouped")
            error = (out - exact[:, None]).pow(2).mean(dim=1).sum().sqrt() / exact.norm()
            errors[f"S = {num_samples}"].append(float(error))
    means = {name: math.exp(np.log(x).mean()) for name, x in errors.items()}
    report = "; ".join(f"{name}: {means[name]:.2%} ({min(x):.2%} to {max(x):.2%})" for name, x in errors.items())
    assert max(errors["fp8-k"]) < 0.10 and max(errors["fp8"]) < 0.11, report
    assert means["fp8-k"] < means["fp8"] < means["S = 64"], report


SETTING = SantaConfig(num_samples=256, sampler="grouped", min_context=0)
TOO_FEW = SantaConfig(num_samples=1, sampler="multinomial", min_context=0)


def test_retrieval_equals_exact():
    """At 2048 with S = 256, question and answer decoded, every prompt comes out as with exact attention; S = 1 shows
    that attention is needed to answer. Two runs of one setting agree: the runs leave the KV cache as they found it."""
    model = evaluate.load_model(device="cpu")
    results = evaluate.sampled_accuracy(model, 2048, 4, [SETTING, TOO_FEW, SETTING], batch_size=4)
    exact, sampled, too_few, again = results
    assert exact.accuracy >= 0.75 and exact.rows_read == 1.0
    assert torch.equal(sampled.right, exact.right)
    assert (sampled.difference, sampled.standard_error) == (0.0, 0.0)
    assert 0 < sampled.rows_read < 0.25
    assert too_few.accuracy == 0.0 and too_few.difference == -exact.accuracy
    assert torch.equal(again.right, sampled.right) and again.rows_read == sampled.rows_read


@pytest.mark.parametrize("kv_dtype", ["fp8-k", "fp8"])
def test_retrieval_with_a_float8_cache(kv_dtype):
    """The rounded cache answers like the model's own, which the comparison is with; and it is what decode attention
    reads, in every step of the runs that it is for and in no other."""
    model = evaluate.load_model(device="cpu")
    dtypes, decode = [], santa.decode

    def spy(q, k, v, **options):
        dtypes.append((k.dtype, v.dtype))
        return decode(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(santa, "decode", spy)
        results = evaluate.sampled_accuracy(model, 2048, 2, [SETTING], batch_size=2, kv_dtype=kv_dtype)
    assert [(x.kv_dtype, x.num_samples) for x in results] == [("model", 0), (kv_dtype, 0), (kv_dtype, 256)]
    assert results[0].accuracy == 1.0 and results[0].exact is None
    for result in results[1:]:
        assert result.exact is results[0] and result.difference == 0.0
    float8 = (torch.float8_e4m3fn, torch.float32 if kv_dtype == "fp8-k" else torch.float8_e4m3fn)
    third = len(dtypes) // 3
    assert dtypes == [(torch.float32, torch.float32)] * third + [float8] * 2 * third


@pytest.mark.gpu
def test_retrieval_accuracy_on_gpu():
    """At 8192 and 200 prompts, S = 256 answers within one point of exact attention; S = 1 does not."""
    model = evaluate.load_model(device="cuda")
    exact, sampled, too_few = evaluate.sampled_accuracy(model, CONTEXT, 200, [SETTING, TOO_FEW], batch_size=50)
    assert exact.accuracy >= 0.98
    assert abs(sampled.difference) <= 0.01, f"{sampled.difference:+.3f} (standard error {sampled.standard_error:.3f})"
    assert 0 < sampled.rows_read < 0.125
    assert too_few.difference < -0.5
