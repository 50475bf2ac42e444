"""Integrations with inference frameworks, each imported on first use: `import santa` needs none of them."""

from importlib import import_module
from types import ModuleType

_INTEGRATIONS = ("transformers", "vllm")


def __getattr__(name: str) -> ModuleType:
    if name in _INTEGRATIONS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_INTEGRATIONS])
