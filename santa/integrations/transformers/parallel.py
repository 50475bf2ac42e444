"""Which of the model's heads are here, where tensor parallelism spreads them over processes."""

from __future__ import annotations

from typing import Any

import torch

# (rank, size) of the module's tensor parallelism, or None. A plain attribute of the module: found once, and a constant
# of compiled graphs.
_PLACE_ATTRIBUTE = "_santa_tensor_parallel"


def first_kv_head_of(module: torch.nn.Module, num_kv_heads: int) -> int:
    """Number of the first of the num_kv_heads that an attention module has here, among those of the model.

    Heads are split as `Shard(0)` splits the rows of their projection: in order, all ranks but the last with as many.
    """
    place = getattr(module, _PLACE_ATTRIBUTE, ...)
    place = note_place(module) if place is ... else place
    if place is None:
        return 0
    rank, size = place
    total = _num_kv_heads(getattr(module, "config", None))
    if total is None:
        return rank * num_kv_heads
    # Heads that every rank has are not split.
    return 0 if total == num_kv_heads else rank * -(-total // size)


def note_place(module: torch.nn.Module) -> tuple[int, int] | None:
    """Look at the module's parameters for tensor parallelism, and keep what is found."""
    place = _find_place(module)
    setattr(module, _PLACE_ATTRIBUTE, place)
    return place


def _find_place(module: torch.nn.Module) -> tuple[int, int] | None:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    for child in module.modules():
        meshes = [parameter.device_mesh for parameter in child.parameters(recurse=False) if _is_split(parameter)]
        # Until 5.16 or so, Transformers kept the mesh beside plain tensors.
        if getattr(child, "_hf_tp_plan", None) is not None:
            meshes.append(getattr(child, "_hf_device_mesh", None))
        for mesh in meshes:
            if (mesh := _tensor_parallel(mesh)) is not None:
                return mesh.get_local_rank(), mesh.size()
    return None


def _is_split(parameter: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor  # not in every build of torch

    return isinstance(parameter, DTensor) and any(placement.is_shard() for placement in parameter.placements)


def _tensor_parallel(mesh: Any) -> Any:
    """The dimension of a DeviceMesh that is for tensor parallelism, by its name; one without names is for nothing else.
    None if there is none."""
    if mesh is None or mesh.size() == 1:
        return None
    names = mesh.mesh_dim_names
    if names is None:
        return mesh if mesh.ndim == 1 else None
    return mesh["tp"] if "tp" in names and mesh["tp"].size() > 1 else None


def _num_kv_heads(config: object) -> int | None:
    """Of the whole model, as its configuration states it; None if it does not, or not as one number."""
    for name in ("num_key_value_heads", "num_attention_heads"):
        heads = getattr(config, name, None)
        if heads is not None:
            return heads if isinstance(heads, int) else None
    return None
