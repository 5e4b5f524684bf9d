"""COCO run lengths of masks, shared by the families that answer with masks."""

import numpy as np
from pycocotools import mask as coco_mask


def decode_mask(rle: dict) -> np.ndarray:
    """COCO run lengths {"size": [h, w], "counts": str or bytes} -> (h, w) uint8."""
    return coco_mask.decode({"size": list(rle["size"]), "counts": rle["counts"]})


def encode_mask(mask: np.ndarray) -> dict[str, object]:
    """(h, w) bool -> COCO run lengths {"size": [h, w], "counts": str}."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()}
