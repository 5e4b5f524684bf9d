"""The fast reader of instances.json gives the content that `json` gives, for every layout of the file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grefcoco_data import annotation_json
from tests.tiny_grefcoco import write_genuine

NUMBERS = st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e9, 1e9), st.sampled_from([0, -0.0, 1e-320, 10**400]))
RINGS = st.lists(st.lists(NUMBERS, max_size=9), max_size=4)
SEGMENTATIONS = st.one_of(
    RINGS,
    st.lists(NUMBERS, max_size=3),
    st.integers(0, 3),
    st.lists(st.lists(st.lists(NUMBERS, max_size=2), max_size=2), max_size=2),
    st.sampled_from([None, "x", [[None]], [[1, "2"]], [[1, True]], [["]]"]], {"size": [1, 2], "counts": [2]}]),
)
TEXT = st.one_of(st.text(max_size=8), st.sampled_from(['"segmentation": [[1, 2]]', '\\"segmentation": [[', "]]"]))
FORMS = ({}, {"separators": (",", ":")}, {"indent": 1}, {"ensure_ascii": False})


@pytest.fixture(params=[1, 3, 1000], ids="batches of {}".format)
def batch(request, monkeypatch) -> int:
    monkeypatch.setattr(annotation_json, "BATCH", request.param)
    return request.param


def reads(folder: Path, text: bytes) -> tuple[object, object]:
    """The results with arrays (converted to lists) and with lists; None for an error."""
    path = folder / "instances.json"
    path.write_bytes(text)
    contents = []
    for as_lists in (False, True):
        try:
            content = annotation_json.read_instances(path, as_lists)
        except ValueError as error:
            assert str(path) in str(error)
            content = None
        contents.append(json.loads(json.dumps(content, default=np.ndarray.tolist)))
    return tuple(contents)


@pytest.mark.slow
@given(st.lists(st.tuples(SEGMENTATIONS, TEXT, TEXT), max_size=6), st.sampled_from(FORMS))
@settings(max_examples=150, deadline=None)
def test_content_is_that_of_json(tmp_path_factory, items, form):
    annotations = [{"id": 1, key: text, "segmentation": shape} for shape, key, text in items]
    text = json.dumps({"annotations": annotations, "images": [{"segmentation": 0}]}, **form)
    arrays, lists = reads(tmp_path_factory.getbasetemp(), text.encode("utf-8", "surrogatepass"))
    assert arrays == lists == json.loads(text)


@pytest.mark.parametrize("form", FORMS[:2])
def test_polygons_are_arrays_or_shared_lists(tmp_path, batch, form):
    source = write_genuine(tmp_path / "set") / "instances.json"
    text = json.dumps(json.loads(source.read_text()), **form)
    assert reads(tmp_path, text.encode()) == (json.loads(text),) * 2
    for as_lists, kind in ((False, np.ndarray), (True, list)):
        items = annotation_json.read_instances(tmp_path / "instances.json", as_lists)["annotations"]
        rings = [ring for item in items if isinstance(item["segmentation"], list) for ring in item["segmentation"]]
        assert len(rings) > 10 and all(type(ring) is kind for ring in rings)
        assert not as_lists or batch < 1000 or rings[0][1] is rings[0][3], "equal numbers should be one object"


BROKEN = {
    "number missing": b'{"annotations": [{"segmentation": [[1, , 2]]}]}',
    "comma missing": b'{"annotations": [{"segmentation": [[1 2, 3]]}]}',
    "two lines": b'{"annotations": [{"segmentation": [[1\n2, 3]]}]}',
    "NaN": b'{"annotations": [{"segmentation": [[NaN, 2]]}]}',
    "nan": b'{"annotations": [{"segmentation": [[nan, 2]]}]}',
    "bracket too many": b'{"annotations": [{"segmentation": [[1, 2]]]}]}',
    "bracket too few": b'{"annotations": [{"segmentation": [[1, 2], 3]]}]}',
    "never closed": b'{"annotations": [{"segmentation": [[1, 2',
    "no UTF-8": b'{"annotations": [{"segmentation": [[1, 2]], "\xff": 0}]}',
    "comma at the end": b'{"annotations": [{"segmentation": [[1, 2,]]}]}',
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    assert reads(tmp_path, BROKEN[name]) == (None, None)


UNUSUAL = {
    "infinite": '{"annotations": [{"segmentation": [[1, 1e999]]}]}',
    "twice": '{"annotations": [{"segmentation": [[1, 2]], "segmentation": [[3, 4]]}]}',
    "elsewhere": '{"images": [{"segmentation": [[1, 2]]}], "annotations": [{"segmentation": [[3, 4]]}]}',
    "a number": '{"annotations": [{"segmentation": 0}, {"segmentation": [[3, 4]]}]}',
    "in a key": '{"annotations": [{"\\"segmentation": [[1, 2]], "segmentation": [[3, 4]]}]}',
    "nested": '{"annotations": [{"segmentation": [[1, [2, 3], 4]]}, {"segmentation": [[[1, 2]]]}]}',
    "no list": '{"annotations": {"segmentation": [[1, 2]]}}',
    "empty": '{"annotations": [{"segmentation": [[]]}, {"segmentation": []}, {"segmentation": [[], [1]]}]}',
    "blank": '{"annotations": [{"segmentation": [[ 1 ,2 ],[ 3,4] ]}, {"segmentation": [[1, 2],[3, 4]]}]}',
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_give_the_content_of_json(tmp_path, name):
    path = tmp_path / "instances.json"
    path.write_text(UNUSUAL[name])
    for as_lists in (False, True):
        content = annotation_json.read_instances(path, as_lists)
        assert json.dumps(content, default=np.ndarray.tolist).replace(".0", "") == json.dumps(
            json.loads(UNUSUAL[name])
        )


@pytest.mark.slow
def test_flipped_bytes_give_the_content_of_json_or_an_error(tmp_path):
    """After a flipped byte the result is that of `json`, or both raise (except for `01` and `1.`)."""
    made = random.Random(0)
    text = (write_genuine(tmp_path / "set") / "instances.json").read_bytes()
    text = text[: text.index(b"}, {", 6_000)] + b"}]" + text[text.index(b', "categories"') :]
    agreed = 0
    for _ in range(400):
        data = bytearray(text)
        data[made.randrange(len(data))] = made.choice(b'0123456789.,[]{}": eE-+x')
        arrays, lists = reads(tmp_path, bytes(data))
        assert arrays == lists
        try:
            expected = json.loads(data)
        except ValueError:
            if arrays is not None:
                assert json.dumps(arrays)[:200]
            continue
        assert arrays == expected
        agreed += 1
    assert agreed > 50
