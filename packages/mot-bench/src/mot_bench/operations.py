"""Every operation that can be measured, by name."""

from __future__ import annotations

from mot_bench.formats import LINEAR_FORMAT
from mot_bench.linear import LINEAR
from mot_bench.mlp import MLP
from mot_bench.norms import QK_NORM_ROPE, RMS_NORM
from mot_bench.registry import Operation

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for operation in (LINEAR, LINEAR_FORMAT, RMS_NORM, QK_NORM_ROPE, MLP)
}
