"""gRefCOCO and the RefCOCO family as Hugging Face data sets.

    grefcoco build --annotations DIR --images train2014.zip --out data/grefcoco    (or: python grefcoco.py build ...)
    grefcoco download | check | stats | show | export

    rows = grefcoco.load("data/grefcoco", split="val")      # one row per sentence, images decoded on access
    load_dataset("data/grefcoco", streaming=True)           # one row per image, as stored

This file is the front door, and a loading script for `datasets` before 4. The code is in the folder `grefcoco_data`.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("grefcoco_data") is None and (note := Path(__file__).with_suffix(".json")).is_file():
    # `datasets` before 4 runs a copy of a loading script in another folder. A JSON file beside the copy holds the
    # original path.
    sys.path.append(str(Path(json.loads(note.read_text(encoding="utf-8"))["original file path"]).resolve().parent))
if find_spec("grefcoco_data") is None:
    raise ImportError(
        "grefcoco.py needs the folder grefcoco_data, which lies beside it in the repository: keep both together, "
        "or install the repository (pip install FOLDER)."
    )
else:  # indented, because `datasets` before 4 asks for a package of the index for every other import
    from grefcoco_data.building import build
    from grefcoco_data.collections import CONFIGS
    from grefcoco_data.grefer import GRefer
    from grefcoco_data.loading import Grefcoco, category_ids, load, shuffle_shards
    from grefcoco_data.rows import EXPRESSION_FEATURES, IMAGE_FEATURES
    from grefcoco_data.video_building import build_videos
    from grefcoco_data.video_collections import VIDEO_CONFIGS
    from grefcoco_data.video_rows import VIDEO_FEATURES

__version__ = "0.1.0"
__all__ = [
    "CONFIGS",
    "EXPRESSION_FEATURES",
    "IMAGE_FEATURES",
    "VIDEO_CONFIGS",
    "VIDEO_FEATURES",
    "GRefer",
    "Grefcoco",
    "build",
    "build_videos",
    "category_ids",
    "load",
    "shuffle_shards",
]

if __name__ == "__main__":
    from grefcoco_data.commands import main

    raise SystemExit(main())
