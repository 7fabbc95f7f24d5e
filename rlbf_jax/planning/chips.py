"""What one chip can do: published figures.

TPUs: peak bfloat16 operations, memory and its bandwidth are those of Google Cloud's pages "TPU v4",
"TPU v5e", "TPU v5p" and "TPU v6e" (cloud.google.com/tpu/docs); bandwidths of one link of the
interconnect are those of Austin et al., "How to Scale Your Model", 2025, chapter 2, table of
chips (jax-ml.github.io/scaling-book). H100: NVIDIA H100 Tensor Core GPU datasheet, SXM5 (dense
bfloat16, 80 GB HBM3, NVLink 900 GB/s both ways).

How links are used. A collective along a mesh axis is taken as a ring that runs both ways around
one axis of the torus: twice the one-way bandwidth of a link. A mesh axis that spans several axes of
the torus may be faster, one that does not wrap around slower: seconds are a roofline, not a
measurement. A device of a v4 topology is one core, half a chip.

Memory is the published figure in 10^9 bytes, which is a little less than libtpu 0.0.42 lets a
program take (15.25 GiB a core of v4, 15.75 of v5e, 95.74 of v5p, 31.25 of v6e, as it says where one
takes more). H100s of one node reach each other through NVSwitch at half of the figure a way.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip."""

    name: str
    peak: float
    """bfloat16 multiplications and additions a second."""
    memory: float
    """Bytes that programs may use."""
    bandwidth: float
    """Bytes a second to and from memory."""
    exchange: float
    """Bytes a second that one chip sends in a ring of a collective, both ways around."""
    remark: str = ""
    """How its programs are planned, where that is not by its own compiler."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12 / 2, 16e9, 1228e9 / 2, 45e9, "a device is one of a chip's two cores"),
        Chip("v5e", 197e12, 16e9, 819e9, 2 * 45e9),
        Chip("v5p", 459e12, 95e9, 2765e9, 2 * 90e9),
        Chip("v6e", 918e12, 32e9, 1640e9, 2 * 90e9),
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, "by formula and XLA's CPU pipeline, not a GPU's"),
    )
}
"""Chips by the name that a topology begins with."""
