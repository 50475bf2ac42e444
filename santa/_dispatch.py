"""What every operator does under torch's transforms: derivatives raise, autocast casts, vmap is refused.

The operators are for inference. Their forward pass runs whatever its inputs ask for, but a derivative of any of their
outputs, backward or forward, is an error: a gradient of zeros or None would be taken for the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Lives as long as the process: a library that is collected takes its kernels along.
_library = torch.library.Library("santa", "IMPL")

# What autocast casts. float8 is a cache's own precision, float64 is left alone as torch's attention leaves it.
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


# Keyword arguments that could ask for a derivative.
_DIFFERENTIABLE = ("k_scale", "v_scale", "sinks", "levels", "scales", "center", "channel_scale")


class TransformError(RuntimeError):
    """A transform that santa's operators do not have. Not an argument error, which `call` makes a ValueError."""


def call(op: Any, *tensors: Tensor | None, **options: Any) -> Any:
    """Call an operator; its argument errors are ValueErrors.

    torch 2.15 hands every C++ exception of a stable-ABI operator on as a RuntimeError; before, std::invalid_argument
    became a ValueError. The prefix is that of api/checks.h; CUDA failures have another one.
    """
    if torch.compiler.is_compiling():
        return op(*tensors, **options)
    try:
        return op(*tensors, **options)
    except TransformError:
        raise
    except RuntimeError as error:
        if str(error).startswith("santa: "):
            raise ValueError(str(error)) from None
        raise


# Derivatives --------------------------------------------------------------------------------------------


def no_derivative(name: str) -> TransformError:
    return TransformError(
        f"santa: {name} has no backward pass and no forward derivative (it is an inference operator); "
        "call it under torch.no_grad() or on detached tensors"
    )


def wants_derivative(tensors: tuple[Any, ...]) -> bool:
    """Whether a derivative with respect to one of the tensors may be asked for later, or is being pushed forward."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        return True
    # Tensors carry tangents within a level alone; to ask each of them would take 3 microseconds of every call.
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


class InferenceOnly(torch.autograd.Function):
    """`run(*tensors)`, a tuple of tensors, none of which has a derivative: it raises when one is asked for."""

    @staticmethod
    def forward(name: str, run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0]
        ctx.mark_non_differentiable(*(x for x in output if not x.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise no_derivative(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise no_derivative(ctx.name)

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, *_: Any) -> Any:
        raise no_vmap(name)


def _autograd_kernel(name: str, op: Any) -> Any:
    def kernel(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        outputs = run(tensors, options)
        if options.get("rows_read") is not None:
            torch.autograd.graph.increment_version(options["rows_read"])
        return outputs

    def run(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, ...]:
        # Every tensor that could ask for a derivative; autograd sees those that are positional alone.
        names = tuple(key for key in _DIFFERENTIABLE if options.get(key) is not None)
        differentiable = (*(options[key] for key in names), *tensors)
        if not wants_derivative(differentiable):
            with torch._C._AutoDispatchBelowAutograd():
                return call(op, *tensors, **options)
        if torch._C._are_functorch_transforms_active():
            # Called by the dispatcher, within a transform, a Function has no way back out to it.
            raise no_derivative(name)
        rest = {key: value for key, value in options.items() if key not in names}

        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            scales = dict(zip(names, tensors, strict=False))
            with torch._C._AutoDispatchBelowAutograd():
                return call(op, *tensors[len(names) :], **scales, **rest)

        return InferenceOnly.apply(name, forward, *differentiable)

    return kernel


def _in_place_autograd_kernel(name: str, op: Any, written: int) -> Any:
    """For an operator that writes its first arguments and returns nothing: there is nothing that could raise later."""

    def kernel(*tensors: Tensor, **options: Any) -> None:
        if wants_derivative((*tensors, *options.values())):
            raise no_derivative(name)
        with torch._C._AutoDispatchBelowAutograd():
            call(op, *tensors, **options)
        for tensor in (*tensors[:written], options.get("rows_read")):
            if tensor is not None:
                torch.autograd.graph.increment_version(tensor)

    return kernel


# vmap ---------------------------------------------------------------------------------------------------


def no_vmap(name: str) -> TransformError:
    return TransformError(
        f"santa: {name} cannot run under vmap; it takes a batch itself, as the first dimension of its tensors: "
        "reshape what vmap would add into that, or loop over it"
    )


def _vmap_kernel(name: str) -> Any:
    def kernel(*_: Any, **__: Any) -> Any:
        raise no_vmap(name)

    return kernel


# autocast -----------------------------------------------------------------------------------------------


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Tensors as torch.autocast has torch's attention take them: in its dtype, where it is on for their device."""
    return tuple(_cast(x) for x in tensors)


def _cast(x: Any) -> Any:
    castable = isinstance(x, Tensor) and x.dtype in _CASTABLE and x.device.type in ("cpu", "cuda")
    if castable and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _autocast_kernel(op: Any, key: str) -> Any:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*tensors: Tensor, **options: Any) -> Any:
        tensors = autocast(*tensors)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*tensors, **options)

    return kernel


def register(name: str, *, written: int = 0) -> None:
    """What operator `name` does under autograd, vmap and, unless it writes tensors of the caller's, autocast.
    `written`: how many, its first arguments.

    Not torch.library.register_autograd and register_autocast: the first takes no schemas with keyword-only tensors, the
    second casts every tensor, scales among them.
    """
    op = getattr(torch.ops.santa, name).default
    autograd = _in_place_autograd_kernel(name, op, written) if written > 0 else _autograd_kernel(name, op)
    _library.impl(name, autograd, "Autograd")
    _library.impl(name, _vmap_kernel(name), "FuncTorchBatched")
    if written == 0:
        for key in ("AutocastCPU", "AutocastCUDA"):
            _library.impl(name, _autocast_kernel(op, key), key)
