"""Complete training samples, one sentence at a time or by image: the last part of benchmarks/data.py, which runs it.

A sample is an image of 480 x 480 pixels, the mask of its targets and the tokens of its sentence, as tensors.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import BertTokenizer

import grefcoco
from grefcoco_data.annotations import targets

torch.set_num_threads(1)
SIDE = 480
SENTENCES = 1_500


def _sentences(built: Path) -> tuple[datasets.Dataset, list[int]]:
    """All rows, and the indices of `SENTENCES` of them: all sentences of images in random order."""
    rows = grefcoco.load(built, split="train", columns=["image", "image_id", "mask", "sentence"])
    image_ids = np.array(rows.with_format(None)["image_id"][:])
    order = np.random.default_rng(0).permutation(np.unique(image_ids))
    return rows, np.concatenate([np.flatnonzero(image_ids == image_id) for image_id in order])[:SENTENCES].tolist()


def _tokenizer(rows: datasets.Dataset) -> BertTokenizer:
    words = {word for sentence in rows.with_format(None)["sentence"][:] for word in sentence.split()}
    return BertTokenizer(
        vocab={word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)])}
    )


def by_pillow(image: Image.Image) -> torch.Tensor:
    """(3, side, side) uint8, as the original mapper gives it."""
    return _tensor(image.resize((SIDE, SIDE), Image.BILINEAR))


def by_torch(image: Image.Image) -> torch.Tensor:
    """(3, side, side) uint8, within one grey level of `by_pillow`: the same filter in vectorised integers."""
    stored = (
        pa.array(image).flatten().to_numpy().reshape(image.height, image.width, 4)
    )  # the memory of PIL, not a copy
    pixels = torch.from_numpy(stored).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)[0, :3]


def _tensor(image: Image.Image) -> torch.Tensor:
    """(3, height, width) uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _mask(rle: dict) -> torch.Tensor:
    """(side, side) uint8, resized by nearest neighbour."""
    mask = coco_mask.decode(rle)
    rows, columns = (((np.arange(SIDE) + 0.5) * side / SIDE).astype(np.intp) for side in mask.shape)
    return torch.from_numpy(mask.T.take(columns, axis=0).take(rows, axis=1).T)


def _tokens(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask, (20,) each."""
    ids = ids[:20]
    return torch.tensor(ids + [0] * (20 - len(ids))), torch.tensor([1] * len(ids) + [0] * (20 - len(ids)))


def ours(pictures: Path, built: Path, resize: Callable[[Image.Image], torch.Tensor]) -> float:
    rows, indices = _sentences(built)
    encode = _tokenizer(rows).backend_tokenizer.encode
    random.Random(0).shuffle(indices)
    start = time.process_time()
    for index in indices:
        row = rows[index]
        resize(row["image"]), _mask(row["mask"]), _tokens(encode(row["sentence"]).ids)
    return time.process_time() - start


def shared(pictures: Path, built: Path) -> float:
    """Batches of 32 with the sentences of an image side by side, as a sampler grouped by `image_id` gives them."""
    rows, indices = _sentences(built)
    encode = _tokenizer(rows).backend_tokenizer.encode
    start = time.process_time()
    for first in range(0, len(indices), 32):
        batch = rows.__getitems__(indices[first : first + 32])
        pixels = {key: by_pillow(image) for key, image in {id(row["image"]): row["image"] for row in batch}.items()}
        for row in batch:
            pixels[id(row["image"])], _mask(row["mask"]), _tokens(encode(row["sentence"]).ids)
    return time.process_time() - start


def mapper(pictures: Path, built: Path) -> float:
    """One sentence at a time from the genuine files, with the steps of the original mapper."""
    refer = grefcoco.GRefer(pictures)
    rows, indices = _sentences(built)
    tokenizer = _tokenizer(rows)
    records = []
    for sent_id in _sent_ids(built, indices):
        ref = refer.sentToRef[sent_id]
        anns = [ann for ann in refer.loadAnns(targets(ref)) if not ann["iscrowd"]]
        path = pictures / "images/train2014" / refer.Imgs[ref["image_id"]]["file_name"]
        records.append({"path": path, "annotations": anns, "sentence": refer.Sents[sent_id]["sent"]})
    random.Random(0).shuffle(records)
    start = time.process_time()
    for record in records:
        mapper_sample(record, tokenizer)
    return time.process_time() - start


def mapper_sample(record: dict, tokenizer: BertTokenizer) -> dict:
    """What the original mapper makes of a sentence: image, padding mask, boxes, masks and tokens, as tensors."""
    record = copy.deepcopy(record)
    with Image.open(record["path"]) as image:
        image.getexif().get(0x0112)
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    padding = torch.from_numpy(np.ones((height, width)))[None, None]
    padding = torch.nn.functional.interpolate(padding, (SIDE, SIDE), mode="bilinear", align_corners=False)
    padding = ~padding[0, 0].numpy().astype(bool)
    pixels = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.BILINEAR))
    sample = {"image": torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))}
    sample["padding_mask"] = torch.as_tensor(np.ascontiguousarray(padding))
    scale = np.array([SIDE / width, SIDE / height])
    instances = [
        [(np.asarray(ring, np.float64).reshape(-1, 2) * scale).reshape(-1) for ring in ann["segmentation"]]
        for ann in record["annotations"]
    ]
    sample["boxes"] = [_box_of_rings(rings) for rings in instances]
    masks = [torch.zeros((SIDE, SIDE), dtype=torch.bool)]
    for rings in instances:
        mask = coco_mask.decode(coco_mask.frPyObjects([ring.tolist() for ring in rings], SIDE, SIDE))
        masks.append(torch.as_tensor(mask, dtype=torch.uint8).any(dim=2))
    sample["mask"] = torch.stack(masks).sum(dim=0, keepdim=True).clamp(max=1)
    sample["tokens"] = _tokens(tokenizer.encode(record["sentence"]))
    return sample


def _box_of_rings(rings: list[np.ndarray]) -> torch.Tensor:
    low, high = torch.full((2,), float("inf")), torch.zeros(2)
    for ring in rings:
        points = torch.from_numpy(ring).view(-1, 2).to(torch.float32)
        low, high = torch.min(low, points.min(dim=0).values), torch.max(high, points.max(dim=0).values)
    return torch.cat([low, high])


def _sent_ids(built: Path, indices: list[int]) -> list[int]:
    return grefcoco.load(built, split="train", columns=["sent_id"]).select(indices)["sent_id"][:]


def limit(pictures: Path, built: Path, sharing: bool) -> float:
    """Only decode and resize the image, for each sentence or (`sharing`) once for all its sentences."""
    rows, indices = _sentences(built)
    names = rows.with_format(None).select(indices)["image_id"][:]
    paths = [
        pictures / f"images/train2014/COCO_train2014_{name:012}.jpg" for name in (set(names) if sharing else names)
    ]
    start = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB").resize((SIDE, SIDE), Image.BILINEAR)
    return time.process_time() - start
