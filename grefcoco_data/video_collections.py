"""The data sets about videos: one `VideoCollection` each, with its files, card, licence, citation and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from grefcoco_data.collections import Release

VIDEO_COUNTED = ("videos", "frames", "objects", "masks", "expressions", "no_target", "single", "multi", "max_targets")


@dataclass(frozen=True)
class VideoCollection:
    """Facts of one data set.

    Args:
        name: of the configuration.
        title: name of the data set on its card.
        description: first paragraph of the card.
        homepage: where the data set is published.
        citation: BibTeX of its paper.
        sentences: names of the file of sentences in the folder of a split; the first that exists is read.
        masks: "mask_dict" (RLE in JSON) or "palette" (PNGs).
        licence: identifier of the licence on the Hub; None when no licence is known.
        counts: official counts per split, with the names of `VIDEO_COUNTED`; only what is known.
        sha256: of the official files by their path below the root, where known.
        release: where the official files can be downloaded, or None.
    """

    name: str
    title: str
    description: str
    homepage: str
    citation: str
    sentences: tuple[str, ...]
    masks: str = "mask_dict"
    licence: str | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    release: Release | None = None

    def find_sentences(self, root: Path, split: str) -> Path | None:
        """The file of sentences of a split, or None."""
        folder = root / split if self.masks == "mask_dict" else root / "meta_expressions" / split
        return next((folder / name for name in self.sentences if (folder / name).is_file()), None)


_MEVIS_TEXT = (
    "Sentences that refer to things in a video by their motion: to one, to several{none}. A model has to segment all "
    "of them on every frame. Most videos come from MOSE."
)
_MEVIS = {"homepage": "https://henghuiding.github.io/MeViS/", "licence": "cc-by-nc-sa-4.0"}
_ALL = (
    VideoCollection(
        name="mevis",
        title="MeViS",
        description=_MEVIS_TEXT.format(none=""),
        citation="""@inproceedings{MeViS,
  title     = {{MeViS}: A Large-scale Benchmark for Video Segmentation with Motion Expressions},
  author    = {Ding, Henghui and Liu, Chang and He, Shuting and Jiang, Xudong and Loy, Chen Change},
  booktitle = {ICCV},
  year      = {2023}
}""",
        sentences=("meta_expressions.json", "meta_expressions_release.json"),
        counts={
            "train": {"videos": 1662, "expressions": 23051},
            "valid_u": {"videos": 50, "expressions": 793},
            "valid": {"videos": 140, "expressions": 2236},
            "test": {"videos": 154, "expressions": 2490},
        },
        sha256={
            "train/mask_dict.json": "f9d9b01a2a6d7a004e2e7a664ce2b9b1576218e975030f8e4df4f66111fb253f",
            "valid_u/mask_dict.json": "6e711a3f713cd95a825f536323e434b4d80f85a8e4e66d0cd662408e8779db50",
        },
        **_MEVIS,
    ),
    VideoCollection(
        name="mevis_v2",
        title="MeViS v2",
        description=_MEVIS_TEXT.format(none=", or to none"),
        citation="""@article{MeViSv2,
  title   = {{MeViS}: A Multi-Modal Dataset for Referring Motion Expression Video Segmentation},
  author  = {Ding, Henghui and Liu, Chang and He, Shuting and Ying, Kaining and Jiang, Xudong and Loy, Chen Change and
             Jiang, Yu-Gang},
  journal = {IEEE TPAMI},
  year    = {2025}
}""",
        sentences=("meta_expressions_v2.json", "meta_expressions_v2_release.json"),
        counts={
            "train": {"videos": 1662, "expressions": 27502},
            "valid_u": {"videos": 50, "expressions": 907},
            "valid": {"videos": 140, "expressions": 2523},
        },
        release=Release(
            "FudanCVL/MeViSv2",
            "674d7df",
            # hashes of these files are not published
            dict.fromkeys(
                [f"{split}/{name}" for split in ("train", "valid_u") for name in ("mask_dict.json", "JPEGImages.tar")]
                + ["train/meta_expressions_v2.json", "valid_u/meta_expressions_v2.json"]
                + ["valid/meta_expressions_v2_release.json", "valid/JPEGImages.tar"],
                "",
            ),
            "",
        ),
        **_MEVIS,
    ),
    VideoCollection(
        name="ref_youtube_vos",
        title="Ref-YouTube-VOS",
        description="Sentences that refer to one object in a video. A model has to segment it on every fifth frame. "
        "The videos come from YouTube-VOS.",
        homepage="https://youtube-vos.org/dataset/rvos/",
        citation="""@inproceedings{URVOS,
  title     = {{URVOS}: Unified Referring Video Object Segmentation Network with a Large-Scale Benchmark},
  author    = {Seo, Seonguk and Lee, Joon-Young and Han, Bohyung},
  booktitle = {ECCV},
  year      = {2020}
}""",
        sentences=("meta_expressions.json",),
        masks="palette",
        counts={"valid": {"videos": 202}, "test": {"videos": 305}},
    ),
)
VIDEO_COLLECTIONS = {collection.name: collection for collection in _ALL}
VIDEO_CONFIGS = tuple(VIDEO_COLLECTIONS)


def video_collection_of(config: str) -> VideoCollection:
    """The collection of a configuration. Raises ValueError for an unknown name."""
    if config not in VIDEO_COLLECTIONS:
        raise ValueError(f"Unknown configuration {config!r}; choose one of {', '.join(VIDEO_COLLECTIONS)}.")
    return VIDEO_COLLECTIONS[config]
