"""The JSON files, read several times faster than by `json.load`, to equal content.

Nine tenths of instances.json are the numbers of its polygons. They are cut out of the text and parsed by Arrow; `json`
reads the rest. A file written in another way than usual, or broken, is read by `json` alone.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

POLYGONS = re.compile(rb'"segmentation": ?\[\[')
BATCH = 2_000  # annotations whose numbers are parsed at once: a MB or two of text


def read_json(path: Path) -> object:
    """The content of a JSON file. Raises ValueError, naming the file, when it is not valid JSON or holds NaN."""
    try:
        with no_collector():
            return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again.") from error


def read_instances(path: Path, as_lists: bool = False) -> object:
    """As `read_json`, for COCO's instances files: rings of polygons are float64 arrays, or, `as_lists`, lists.

    Lists take three times the memory of arrays, though equal numbers among them are one object.
    """
    with no_collector():
        content = _read_apart(path.read_bytes(), as_lists)
    return read_json(path) if content is None else content


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Garbage is not looked for meanwhile: in a growing tree of a million objects that takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _read_apart(data: bytes, as_lists: bool) -> dict | None:
    """Instances with polygons parsed by Arrow; None when the text is not of the usual form."""
    rest, texts, polygons, at = [], [], [], 0
    shared = {} if as_lists else None
    try:
        for match in POLYGONS.finditer(data):
            end = data.index(b"]]", match.end())
            # A number stands for the polygons until they are parsed.
            rest += [data[at : match.end() - 2], b"%d" % (len(polygons) + len(texts))]
            texts.append(data[match.end() : end])
            at = end + 2
            if len(texts) == BATCH:
                polygons += _parse_polygons(texts, shared)
                texts = []
        polygons += _parse_polygons(texts, shared)
        rest = b"".join([*rest, data[at:]]).decode("utf-8")
        content = json.loads(rest, parse_constant=_refuse_constant)
        items = [item for item in content["annotations"] if type(item["segmentation"]) is int]
        if [item["segmentation"] for item in items] != list(range(len(polygons))):
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    for item, rings in zip(items, polygons):
        item["segmentation"] = rings
    return content


def _parse_polygons(texts: list[bytes], shared: dict[float, float] | None) -> list[list]:
    """Rings of texts such as `1.5, 2], [3, 4`, as lists of the numbers in `shared`, or as arrays when that is None.

    Raises ValueError for a ring that is more than finite numbers.
    """
    if not texts:
        return []
    gap = b"], [" if any(b"], [" in text for text in texts) else b"],["
    polygons = [text.split(gap) for text in texts]
    rings = list(chain.from_iterable(polygons))
    ends = np.cumsum([ring.count(b",") + 1 if ring else 0 for ring in rings]).tolist()
    numbers = _parse_numbers(b",".join(rings).replace(b",", b"\n"))
    values = numbers.to_numpy()
    if len(values) != ends[-1] or not np.isfinite(values).all():
        raise ValueError("an empty place, or no finite number")
    if shared is not None:
        encoded = numbers.combine_chunks().dictionary_encode()
        distinct = [shared.setdefault(number, number) for number in encoded.dictionary.to_pylist()]
        objects = np.array(distinct, dtype=object)[encoded.indices.to_numpy()]
        parts = (objects[start:end].tolist() for start, end in zip([0, *ends], ends))
    else:
        parts = (values[start:end] for start, end in zip([0, *ends], ends))
    return [list(islice(parts, len(polygon))) for polygon in polygons]


def _parse_numbers(lines: bytes) -> pa.ChunkedArray:
    """One float64 a line; empty lines are skipped. (Of JSON's grammar but that `01` and `1.` pass.)"""
    read = csv.ReadOptions(column_names=["number"], block_size=1 << 24, use_threads=False)
    convert = csv.ConvertOptions(column_types={"number": pa.float64()}, null_values=[])
    return csv.read_csv(io.BytesIO(lines), read, csv.ParseOptions(quote_char=False), convert)["number"]
