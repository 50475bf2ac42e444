"""How much of the cache the decode steps of a model read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .layers import santa_modules, unwrap

# A plain attribute of an attention module: it is in no state_dict.
RECORD_ATTRIBUTE = "_santa_rows_read"


@dataclass
class RowsRead:
    """What `santa.decode` read, step by step, for each layer; filled by `record_rows_read`.

    Attributes:
        rows_read: layer index -> one int32 [batch, num_kv_heads] tensor of distinct V rows read per step.
        kv_lens: layer index -> one int32 [batch] tensor of valid keys per step.
        features_read: layer index -> one int32 [batch, num_kv_heads] tensor of distinct key features read per step;
            of layers with Bernoulli scores alone.
        head_dims: layer index -> head_dim; of the same layers.
    """

    rows_read: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    kv_lens: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    features_read: dict[int, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    head_dims: dict[int, int] = field(default_factory=dict)

    def share(self, layer_idx: int | None = None) -> float:
        """V rows read over V rows there were, in all layers or in one; NaN if `santa.decode` did not run."""
        layers = list(self.rows_read) if layer_idx is None else [layer_idx]
        read = available = 0
        for layer in layers:
            for rows, lens in zip(self.rows_read[layer], self.kv_lens[layer], strict=True):
                read += int(rows.sum(dtype=torch.int64))
                available += int(lens.sum(dtype=torch.int64)) * rows.shape[1]
        return read / available if available else float("nan")

    def feature_share(self, layer_idx: int | None = None) -> float:
        """Key features read over those there were, in all layers with Bernoulli scores or in one; NaN without any."""
        layers = list(self.features_read) if layer_idx is None else [layer_idx]
        read = available = 0
        for layer in layers:
            for features in self.features_read[layer]:
                read += int(features.sum(dtype=torch.int64))
                available += features.numel() * self.head_dims[layer]
        return read / available if available else float("nan")


@contextmanager
def record_rows_read(model: torch.nn.Module) -> Iterator[RowsRead]:
    """Collect the V rows that the decode steps inside the `with` block read. For eager models.

    Steps that do not go through `santa.decode` (prefill, masks with holes) are not recorded. The counts stay on the
    model's device until they are asked for, so that recording does not synchronise.

    Raises:
        TypeError: model is no Transformers model, and holds none.
        ValueError: the model has no layer that `santa` runs.
        RuntimeError: from the forward pass, if it runs compiled: a graph cannot append to a Python list.
    """
    record = RowsRead()
    modules = santa_modules(unwrap(model))
    for module in modules:
        setattr(module, RECORD_ATTRIBUTE, record)
    try:
        yield record
    finally:
        for module in modules:
            delattr(module, RECORD_ATTRIBUTE)
