"""Masks as COCO run lengths (RLE): checked, encoded, decoded, merged; and boxes from xywh to xyxy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask

MAX_PIXELS = 178_956_970  # Pillow does not open larger images
BLOCK = 1 << 18  # characters that are checked at once


def decode_mask(rle: dict) -> np.ndarray:
    """(height, width) uint8 of 0 and 1."""
    return coco_mask.decode(rle)


def encode_mask(mask: np.ndarray) -> dict:
    """RLE `{"size": [height, width], "counts": str}` of a (height, width) mask; whatever is not zero is inside."""
    rle = coco_mask.encode(np.asfortranarray(np.asarray(mask) != 0, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def empty_rle(height: int, width: int) -> dict:
    """RLE of a mask without any pixel."""
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def merge_rles(rles: Sequence[dict], crowd: Sequence[bool], height: int, width: int) -> dict:
    """Union of the masks of all targets of a sentence, as RLE.

    Crowd regions are ignored when there is any other target, as in the published evaluation. A sentence whose
    targets are all crowds gets their union (the original code fails on it).
    """
    chosen = [rle for rle, is_crowd in zip(rles, crowd) if not is_crowd] or list(rles)
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        return empty_rle(height, width)
    return {"size": [height, width], "counts": coco_mask.merge(chosen)["counts"].decode()}


def to_rle(segmentation: list | dict, height: int, width: int) -> tuple[dict, str | None]:
    """Convert a COCO segmentation (polygons in pixels, or RLE, compressed or not) to an RLE with `counts` as text.

    Everything is checked before pycocotools gets it, because its C code does not check its input. The polygons of one
    object are united. Returns the RLE and what was wrong, or None; invalid polygons are ignored.
    """
    if isinstance(segmentation, dict):
        counts, fault = _checked_counts(segmentation, height, width)
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    else:
        rings = [_checked_ring(ring, height, width) for ring in segmentation]
        valid = [ring for ring, _ in rings if ring is not None]
        fault = next((fault for _, fault in rings if fault), None if rings else "no polygon")
        if not valid:
            return empty_rle(height, width), fault
        rles = coco_mask.frPyObjects(valid, height, width)
        rle = rles[0] if len(rles) == 1 else coco_mask.merge(rles)
    return {"size": [height, width], "counts": rle["counts"].decode()}, fault


def covered_area(boxes: Sequence[Sequence[float]] | np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(n, 4) xyxy in pixels -> (height, width) bool, what the boxes cover together."""
    mask = np.zeros(shape, bool)
    for left, top, right, bottom in np.asarray(boxes).round().astype(int).clip(0):
        mask[top:bottom, left:right] = True
    return mask


def xywh_to_xyxy(boxes: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """Convert boxes (n, 4) from x, y, width, height to x1, y1, x2, y2; float32. No boxes give (0, 4)."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _checked_ring(ring: object, height: int, width: int) -> tuple[np.ndarray | None, str | None]:
    """Coordinates x, y, x, y, ... that are safe for the C code, or None; and what is wrong, or None."""
    if not isinstance(ring, (list, np.ndarray)) or len(ring) < 6 or len(ring) % 2:
        return None, "polygon with less than 3 points or an odd number of coordinates"
    try:
        points = np.asarray(ring)
    except (ValueError, OverflowError):
        return None, "polygon that is not a list of numbers"
    if points.ndim != 1 or points.dtype.kind not in "if" or not np.isfinite(points).all():
        return None, "polygon that is not a list of finite numbers"
    limits = np.tile([width, height], len(ring) // 2)
    if ((points >= -limits) & (points <= 2 * limits)).all():
        return points.astype(np.float64), None
    return np.clip(points, -limits, 2 * limits).astype(np.float64), "polygon far outside its image, clipped"


def _checked_counts(rle: dict, height: int, width: int) -> tuple[list[int], str | None]:
    """Run lengths that cover the image exactly, and None; or one run of background and what is wrong."""
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decoded_counts(counts)
    if rle.get("size") != [height, width]:
        fault = f"RLE of size {rle.get('size')} in an image of {[height, width]}"
    elif not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        fault = "RLE whose counts are not run lengths"
    elif sum(counts) != height * width:
        fault = "RLE that does not cover its image exactly"
    else:
        return _without_empty_runs(counts), None
    return [height * width], fault


def _without_empty_runs(counts: list[int]) -> list[int]:
    """The same mask; only the first run may be empty, because pycocotools merges other RLEs wrongly or crashes."""
    if all(counts[1:]):
        return counts
    joined = counts[:1]
    for index, run in enumerate(counts[1:], 1):
        if run and index % 2 == len(joined) % 2:
            joined.append(run)
        else:  # of the kind of the run before, or empty
            joined[-1] += run
    return joined


def _decoded_counts(text: str) -> list[int] | None:
    """Run lengths of a compressed RLE (COCO's `rleFrString`); None when the text is not one.

    A character holds 5 bits of a number, low bits first. From the third number on, the difference to the number two
    places before is stored.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # bit 5 says that the number goes on
            if bits & 16:  # bit 4 of the last character is the sign
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts


def rle_covers_image(counts: pa.StringArray, pixels: np.ndarray) -> np.ndarray:
    """Whether each compressed RLE covers its image exactly, without empty runs after the first, (n,) bool.

    `to_rle` makes such RLEs. Merging others, pycocotools stops too early or writes outside its memory.

    Args:
        counts: n texts.
        pixels: (n,) height times width of the images, at most `MAX_PIXELS`.
    """
    if counts.null_count:
        counts = counts.fill_null("")
    _, offsets, content = counts.buffers()
    ends = np.frombuffer(offsets, np.int32)[counts.offset : counts.offset + len(counts) + 1] if len(counts) else []
    text = np.frombuffer(content, np.uint8) if content else np.zeros(0, np.uint8)
    covers = np.zeros(len(counts), bool)
    start = 0
    while start < len(counts):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + BLOCK)) - 1)
        bounds = ends[start : stop + 1]
        covers[start:stop] = _cover(text[bounds[0] : bounds[-1]], bounds - bounds[0], pixels[start:stop])
        start = stop
    return covers


def _cover(text: np.ndarray, ends: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """`rle_covers_image` of one block: characters (m,), bounds of the texts (n + 1,), pixels (n,)."""
    starts, stops = ends[:-1], ends[1:]
    is_valid = stops > starts
    if not len(text):
        return is_valid
    bits = text - np.uint8(48)  # characters below "0" wrap to more than 63
    if bits.max() > 63:
        is_valid[np.searchsorted(ends, np.flatnonzero(bits > 63), side="right") - 1] = False
    is_last = bits & 32 == 0  # of a number
    is_valid[is_valid] = is_last[stops[is_valid] - 1]  # else the last number goes on
    is_last[stops[stops > 0] - 1] = True  # so that numbers do not cross texts
    last = np.flatnonzero(is_last)
    bounds = np.searchsorted(last, ends)  # of the numbers of each text
    first, stop = bounds[:-1][is_valid], bounds[1:][is_valid]
    is_valid[is_valid] = _runs_cover(_numbers(bits, is_last, last), first, stop, pixels[is_valid])
    return is_valid


def _numbers(bits: np.ndarray, is_last: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers that end at the characters `last`: 5 bits a digit, low digits first; bit 4 of the last is the sign.

    int32, as no run of an image is longer than `MAX_PIXELS`. Numbers that no valid RLE has become others of this kind.
    """
    values = ((bits & 31 ^ 16).view(np.int8) - np.int8(16)).astype(np.int16)  # of each character, as if it were last
    goes_on = ~is_last[:-1]
    values[1:] += (values[1:] * np.int16(31) + (bits[:-1] & 31)) * goes_on  # 32 times a last digit, and the one before
    values = values[last].astype(np.int32)
    place = np.flatnonzero(goes_on[:-1] & goes_on[1:] & is_last[2:])  # third digits from the end, which are rare
    number = np.searchsorted(last, place + 2)
    for _ in range(5):  # a number has at most 7 digits
        high = np.clip(values[number], -(1 << 24), 1 << 24)  # does not overflow; what was outside remains too large
        values[number] = (high << 5) + (bits[place] & 31)
        has_more = ~is_last[place - 1]
        place, number = place[has_more] - 1, number[has_more]
    values[number] = MAX_PIXELS + 1
    return values


def _runs_cover(values: np.ndarray, first: np.ndarray, stop: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Whether the runs of each text are 1 to `MAX_PIXELS` long (the first may be 0) and sum to its pixels, (n,) bool.

    From its fourth number on, a text holds the difference to the number two places before. So the runs after the first
    are sums over every second number, less the sum before.

    Args:
        values: the numbers of all texts.
        first, stop: (n,) bounds of the numbers of each text, at least one.
        pixels: (n,).
    """
    total = values[first].astype(np.int64)
    fits = (total >= 0) & (total <= MAX_PIXELS)
    for parity in 0, 1:
        every_second = values[parity::2]
        sums = np.zeros(len(every_second) + 2, np.int64)  # 0 before the first, and one place for the last bound
        np.cumsum(every_second, out=sums[1:-1])
        begin, end = (first - parity) // 2 + 2, (stop - parity + 1) // 2 + 1  # in `sums`, without the first number
        base = sums[begin - 1]
        bounds = np.stack([begin, end], axis=1).ravel()
        shortest, longest, covered = (f.reduceat(sums, bounds)[::2] for f in (np.minimum, np.maximum, np.add))
        is_empty = begin == end  # as in a text of one number
        fits &= is_empty | ((shortest > base) & (longest - base <= MAX_PIXELS))
        total += np.where(is_empty, 0, covered - (end - begin) * base)
    return fits & (total == pixels)
