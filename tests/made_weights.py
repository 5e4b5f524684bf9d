"""Weights made from parameter names alone, so that a golden output needs no stored checkpoint.

Each array is drawn from numpy's frozen legacy stream, seeded by the crc32 of "SEED:NAME", and scaled by what the name
says so that every path of the network matters. The goldens were made with exactly these numbers: nothing may change.
"""

import math
import zlib

import numpy as np
import torch

NORM_PARTS = ("norm", "LayerNorm", ".bn", "layer_norm")
WIDE_PARTS = ("relative_position_bias_table", "level_embed", "query_", "embeddings")
NARROWED = {"mask_embed.layers.2": 0.15, "minimap_embed": 0.5, "pixel_decoder.mask_features": 0.5}


def made_weights(keys: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """One fp32 tensor for each name and shape."""
    weights = {}
    for name, shape in keys.items():
        offset, scale = _offset_and_scale(name, shape)
        stream = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
        drawn = np.asarray(offset + scale * stream.standard_normal(shape), dtype=np.float32)
        weights[name] = torch.from_numpy(drawn)
    return weights


def parse_keys(text: str) -> dict[str, tuple[int, ...]]:
    """Lines `name<TAB>d0,d1,...` to shapes by name; an empty second field is a scalar."""
    pairs = (line.split("\t") for line in text.splitlines())
    return {name: tuple(int(side) for side in dims.split(",") if side) for name, dims in pairs}


def _offset_and_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    module, _, leaf = name.rpartition(".")
    normalises = any(part in module for part in NORM_PARTS) or (module.endswith(".1") and len(shape) == 1)
    if leaf == "running_var":
        return 1.0, 0.05
    if leaf == "running_mean":
        return 0.0, 0.2
    if normalises and leaf == "weight" and len(shape) == 1:
        return 1.0, 0.2
    if name.endswith("sampling_offsets.bias"):
        return 0.0, 1.5
    if any(part in name for part in WIDE_PARTS):
        return 0.0, 0.7
    if len(shape) < 2:
        return 0.0, 0.2 if shape else 0.8
    gain = 1.2 * math.prod(factor for part, factor in NARROWED.items() if part in name)
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))
