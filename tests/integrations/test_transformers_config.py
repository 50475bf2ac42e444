"""The settings of the Transformers integration, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4.0")

from helpers.models import SHAPE, FakeAttention, layer_qkv, make_model, make_prompt
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import santa
from santa.integrations import transformers as integration

# Settings -------------------------------------------------------------------------------------------


def test_importing_santa_does_not_import_transformers() -> None:
    code = "import sys, santa; santa.SantaConfig(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_normalises() -> None:
    config = santa.SantaConfig(sampler="Systematic", budget=1, layers=[3, 1, 3])
    assert config.sampler is santa.Sampler.SYSTEMATIC
    assert config.budget is santa.Budget.UNIFORM
    assert config.layers == (1, 3)
    assert [config.samples_in_layer(i) for i in range(4)] == [0, 256, 0, 256]
    assert santa.SantaConfig(sampler="grouped", budget=None) == santa.SantaConfig()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_samples": -1}, ValueError, "num_samples is -1; it needs to be from 0 to 1048576"),
        (
            {"num_samples": (1 << 20) + 1},
            ValueError,
            "num_samples is 1048577; it needs to be from 0 to 1048576",
        ),
        ({"num_samples": 2.5}, TypeError, "num_samples is 2.5; it needs to be an int"),
        ({"num_samples": True}, TypeError, "num_samples is True; it needs to be an int"),
        (
            {"sampler": "best"},
            ValueError,
            "sampler is 'best'; it needs to be one of .*'grouped'.* or a santa.Sampler",
        ),
        ({"sampler": 7}, ValueError, "sampler is 7; it needs to be one of"),
        (
            {"budget": "even"},
            ValueError,
            "budget is 'even'; it needs to be one of .*'uniform'.* or a santa.Budget",
        ),
        ({"seed": -1}, ValueError, "seed is -1; it needs to be from 0"),
        ({"seed": 1 << 62}, ValueError, "seed is 4611686018427387904; it needs to be from 0"),
        ({"min_context": -5}, ValueError, "min_context is -5; it needs to be from 0"),
        ({"min_context": "8"}, TypeError, "min_context is '8'; it needs to be an int"),
        ({"layers": 3}, TypeError, "layers is 3; it needs to be None or a collection of layer indices"),
        ({"layers": [0, -1]}, ValueError, "layers is -1; it needs to be from 0"),
        ({"layers": ["0"]}, TypeError, "layers is '0'; it needs to be an int"),
    ],
)
def test_config_errors(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        santa.SantaConfig(**fields)


def test_register_twice_then_select_by_name() -> None:
    integration.register()
    integration.register()
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="santa")
    assert model.config._attn_implementation == "santa"


def test_model_with_attached_config_can_be_saved(tmp_path: Any) -> None:
    model = integration.attach(make_model(), santa.SantaConfig(num_samples=8))
    model.save_pretrained(tmp_path)
    assert "santa_config" not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation != "santa"


# Errors ---------------------------------------------------------------------------------------------


def test_dropout_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.1; it needs to be 0"):
        integration.attention(FakeAttention(), *layer_qkv(), None, dropout=0.1)


def test_training_is_refused() -> None:
    model = integration.attach(make_model(), santa.SantaConfig()).train()
    with pytest.raises(
        NotImplementedError,
        match="the model is in training mode with gradients on; it needs to be in inference",
    ):
        model(**make_prompt())
    with torch.no_grad():
        model(**make_prompt())


@pytest.mark.parametrize("q_len", [1, 5])
def test_unsupported_head_dim_is_refused_at_the_first_call(q_len: int) -> None:
    with pytest.raises(ValueError, match=r"FakeAttention has head_dim 80; it needs one of .*64"):
        integration.attention(FakeAttention(), *layer_qkv(q_len, head_dim=80), None)
    query, key, value = layer_qkv(q_len)
    with pytest.raises(ValueError, match="head_dim 64 with values of 32"):
        integration.attention(FakeAttention(), query, key, value[..., :32], None)


def test_unsupported_dtypes_are_refused_at_the_first_call() -> None:
    query, key, value = (x.double() for x in layer_qkv())
    with pytest.raises(TypeError, match="runs in float64 on cpu; it needs to be bfloat16 or float16 or float32"):
        integration.attention(FakeAttention(), query, key, value, None)
    with torch._subclasses.FakeTensorMode():
        query, key, value = (torch.empty(2, 8, 1, 64, device="cuda") for _ in range(3))
        with pytest.raises(TypeError, match="runs in float32 on cuda; it needs to be bfloat16 or float16"):
            integration.attention(FakeAttention(num_key_value_groups=1), query, key, value, None)


def test_module_without_layer_idx_is_refused() -> None:
    with pytest.raises(ValueError, match="FakeAttention has no layer_idx"):
        integration.attention(FakeAttention(layer_idx=None), *layer_qkv(), None)


def test_attach_errors() -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"config is a dict; it needs to be a santa\.SantaConfig"):
        integration.attach(model, {"num_samples": 4})
    with pytest.raises(
        ValueError,
        match=r"layers has \[7\]; it needs to name attention layers of LlamaForCausalLM .*, which are \[0, 1\]",
    ):
        integration.attach(model, santa.SantaConfig(layers=[0, 7]))
    narrow = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "head_dim": 80}))
    with pytest.raises(ValueError, match=r"LlamaAttention \(2\) has head_dim 80"):
        integration.attach(narrow)
    encoder = BertModel(BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(
        ValueError,
        match=r"model is a BertModel; it needs to have causal attention layers .* BertSelfAttention \(1\) does not say",
    ):
        integration.attach(encoder)
    for refused in (model, narrow, encoder):
        assert refused.config._attn_implementation != "santa"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_float32_model_decodes_under_autocast(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype that counts is the one that attention is cast to."""
    module = sys.modules["santa.integrations.transformers.attention"]  # the package has a function of that name
    monkeypatch.setattr(module, "_DTYPES", {device: (torch.bfloat16, torch.float16)})
    model, prompt = make_model().to(device), make_prompt()["input_ids"].to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        expected = model(prompt).logits
        integration.attach(model, santa.SantaConfig(num_samples=0))
        cache = model(prompt[:, :-1]).past_key_values
        logits = model(prompt[:, -1:], past_key_values=cache).logits
    assert (logits[:, -1] - expected[:, -1]).abs().max() < 0.05 * expected.std()
    with torch.no_grad(), pytest.raises(TypeError, match=f"runs in float32 on {device}; it needs to be bfloat16"):
        model(prompt[:, -1:], past_key_values=cache)


@pytest.mark.gpu
def test_float32_on_cuda_is_refused() -> None:
    model = integration.attach(make_model().cuda(), santa.SantaConfig())
    with pytest.raises(TypeError, match="LlamaAttention runs in float32 on cuda; it needs to be bfloat16 or float16"):
        model(make_prompt()["input_ids"].cuda())
