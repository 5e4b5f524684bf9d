"""A small data set about videos in the genuine layout: the annotations of the goldens, with frames made here."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

GOLDENS = Path(__file__).with_name("goldens") / "mevis"


def write_mevis(root: Path, splits: tuple[str, ...] = ("valid_u",), stem: str = "meta_expressions") -> Path:
    """Write each split with the golden videos; all but "valid" have masks. Returns `root`."""
    for split in splits:
        shutil.copytree(GOLDENS / "valid_u", root / split)
        if stem != "meta_expressions":
            (root / split / "meta_expressions.json").rename(root / split / f"{stem}.json")
        content = json.loads((root / split / f"{stem}.json").read_text())
        masks = json.loads((root / split / "mask_dict.json").read_text())
        rng = np.random.default_rng(0)
        for video_id, video in content["videos"].items():
            ids = [anno_id for e in video["expressions"].values() for anno_id in e["anno_id"]]
            height, width = next(mask["size"] for anno_id in ids for mask in masks[str(anno_id)] if mask)
            folder = root / split / "JPEGImages" / video_id
            folder.mkdir(parents=True)
            for name in video["frames"]:
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}.jpg")
            if split == "valid":
                for expression in video["expressions"].values():
                    del expression["obj_id"], expression["anno_id"]
        if split == "valid":
            (root / split / "mask_dict.json").unlink()
        (root / split / f"{stem}.json").write_text(json.dumps(content))
    return root
