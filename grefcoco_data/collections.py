"""The data sets that can be read: one `Collection` each, with its files, card, licence, citation and official counts.

A new data set of the RefCOCO kind (a file of refs beside a COCO instances.json) is one more entry here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

COUNTED = ("images", "refs", "expressions", "no_target", "single", "multi", "max_targets")  # what is counted per split
COCO_TRAIN_2014 = "http://images.cocodataset.org/zips/train2014.zip"
COCO_TERMS = (
    "COCO's images belong to their authors and carry the Flickr licence each was published under; COCO's terms of use "
    "apply (https://cocodataset.org/#termsofuse)."
)
COCO_CITATION = """@inproceedings{COCO,
  title     = {Microsoft {COCO}: Common Objects in Context},
  author    = {Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan,
               Deva and Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle = {ECCV},
  year      = {2014}
}"""


@dataclass(frozen=True)
class Release:
    """The official files of a data set on the Hub, at one revision, and the zip of its images."""

    repo: str
    revision: str
    sha256: dict[str, str]  # file name -> hexadecimal sha256
    images: str  # URL


@dataclass(frozen=True)
class Collection:
    """Facts of one data set with one way of splitting it.

    Args:
        dataset: folder of its files, and the first argument of `GRefer`.
        split_by: author of the split, as in the name of the refs file.
        title: name of the data set on its card.
        description: first paragraph of the card.
        homepage: where the data set is published.
        citation: BibTeX of its papers.
        licence: identifier of the annotations' licence on the Hub; None when no licence is known.
        licence_name: the same for readers of the card.
        image_terms: terms of the images.
        image_folder: usual name of the folder of images.
        tags: tags of the card.
        notes: Markdown list for the card, of what its users should know.
        single_target: whether each ref has exactly one target, written as a number and not as a list.
        counts: official counts per split, with the names of `COUNTED`; only what is known.
        release: where the official files can be downloaded, or None.
    """

    dataset: str
    split_by: str
    title: str
    description: str
    homepage: str
    citation: str
    licence: str | None = None
    licence_name: str = ""
    image_terms: str = COCO_TERMS
    image_folder: str = "train2014"
    tags: tuple[str, ...] = ("referring-expression-segmentation", "referring-expression-comprehension")
    notes: str = ""
    single_target: bool = True
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    release: Release | None = None

    @property
    def name(self) -> str:
        """Name of the configuration, such as `refcoco_unc`; `grefcoco`, which has one split only, is plain."""
        return self.dataset if self.dataset == "grefcoco" else f"{self.dataset}_{self.split_by}"

    @property
    def refs_stem(self) -> str:
        """Name of the refs file without its suffix."""
        return f"{'grefs' if self.dataset == 'grefcoco' else 'refs'}({self.split_by})"

    def differences(self, split: str, counts: dict[str, int]) -> dict[str, int] | None:
        """Official counts of a split that `counts` do not equal; None when no official count is known."""
        official = self.counts.get(split)
        return official and {name: number for name, number in official.items() if counts[name] != number}


def _full_counts(*numbers: int) -> dict[str, int]:
    return dict(zip(COUNTED, numbers, strict=True))


_GREFCOCO = Collection(
    dataset="grefcoco",
    split_by="unc",
    title="gRefCOCO",
    description="Sentences that refer to one object in an image, to several, or to none. A model has to segment "
    "(GRES) or box (GREC) everything that the sentence means, or to answer that nothing in the image fits. The images "
    "come from COCO train2014.",
    homepage="https://henghuiding.github.io/GRES/",
    licence="cc-by-nc-sa-4.0",
    licence_name="CC BY-NC-SA 4.0",
    tags=(
        "referring-expression-segmentation",
        "referring-expression-comprehension",
        "generalized-referring-expressions",
        "grefcoco",
        "refcoco",
    ),
    notes="""- **Always answering "nothing here" scores val gIoU 62.58** (testA 23.17, testB 29.09), and as much
  in GREC precision. Report T_acc, N_acc and this baseline beside every gIoU.
- val has no sentence with exactly one target.
- Image 320432 is in val and in testA, so the official release has 19,994 images in all.
- The first paper counts 278,232 expressions; the release was revised after it.""",
    citation="""@inproceedings{GRES,
  title     = {{GRES}: Generalized Referring Expression Segmentation},
  author    = {Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle = {CVPR},
  year      = {2023}
}
@article{GREC,
  title   = {{GREC}: Generalized Referring Expression Comprehension},
  author  = {He, Shuting and Ding, Henghui and Liu, Chang and Jiang, Xudong},
  journal = {arXiv preprint arXiv:2308.16182},
  year    = {2023}
}
"""
    + COCO_CITATION,
    single_target=False,
    counts={
        "train": _full_counts(16_994, 78_930, 209_344, 19_140, 120_624, 69_580, 18),
        "val": _full_counts(1_501, 4_237, 14_229, 8_905, 0, 5_324, 14),
        "testA": _full_counts(750, 6_265, 19_200, 4_448, 5_917, 8_835, 16),
        "testB": _full_counts(750, 4_618, 16_063, 4_673, 5_646, 5_744, 14),
    },
    release=Release(
        repo="FudanCVL/gRefCOCO",
        revision="81eede59b3ac070049f597d023c0ff08d1fb80e9",
        sha256={
            "grefs(unc).json": "cc37c5ff95373c78a6a3f98b4c7bc67fde387ea8514752a1392db64223eb3366",
            "instances.json": "7f86adb7f4c39db19c7f02a3cc604d17f8016e4c4e8312652d0acc4eae3a2cbd",
        },
        images=COCO_TRAIN_2014,
    ),
)

_REFER = "https://github.com/lichengunc/refer"
_REFERIT_CITATION = """@inproceedings{ReferItGame,
  title     = {{ReferItGame}: Referring to Objects in Photographs of Natural Scenes},
  author    = {Kazemzadeh, Sahar and Ordonez, Vicente and Matten, Mark and Berg, Tamara},
  booktitle = {EMNLP},
  year      = {2014}
}"""
_REFCOCO_CITATION = f"""@inproceedings{{RefCOCO,
  title     = {{Modeling Context in Referring Expressions}},
  author    = {{Yu, Licheng and Poirson, Patrick and Yang, Shan and Berg, Alexander C. and Berg, Tamara L.}},
  booktitle = {{ECCV}},
  year      = {{2016}}
}}
{_REFERIT_CITATION}
{COCO_CITATION}"""
_GOOGLE_CITATION = """@inproceedings{RefCOCOg,
  title     = {Generation and Comprehension of Unambiguous Object Descriptions},
  author    = {Mao, Junhua and Huang, Jonathan and Toshev, Alexander and Camburu, Oana and Yuille, Alan and Murphy,
               Kevin},
  booktitle = {CVPR},
  year      = {2016}
}"""
_UMD_CITATION = """@inproceedings{RefCOCOgUMD,
  title     = {Modeling Context Between Objects for Referring Expression Understanding},
  author    = {Nagaraja, Varun K. and Morariu, Vlad I. and Davis, Larry S.},
  booktitle = {ECCV},
  year      = {2016}
}"""
_REFCOCO = "Sentences that refer to exactly one object in an image of COCO train2014, written by players of a game in "
_IMAGES_SPLIT = "- testA refers to people, testB to everything else."
_OBJECTS_SPLIT = "- The google split divides objects, not images: an image can be in train and in val."

_ALL = (
    _GREFCOCO,
    Collection(
        dataset="refcoco",
        split_by="unc",
        title="RefCOCO",
        description=_REFCOCO + "which another player had to find the object.",
        homepage=_REFER,
        citation=_REFCOCO_CITATION,
        notes=_IMAGES_SPLIT,
        counts={  # TensorFlow Datasets' catalogue (images, refs), FlagEval (expressions); every ref has one target
            "train": {"images": 16_994, "refs": 42_404, "expressions": 120_624, "no_target": 0, "multi": 0},
            "val": {"images": 1_500, "refs": 3_811, "expressions": 10_834, "no_target": 0, "multi": 0},
            "testA": {"expressions": 5_657, "no_target": 0, "multi": 0},
            "testB": {"expressions": 5_095, "no_target": 0, "multi": 0},
        },
    ),
    Collection(
        dataset="refcoco",
        split_by="google",
        title="RefCOCO, split by Google",
        description=_REFCOCO + "which another player had to find the object.",
        homepage=_REFER,
        citation=_REFCOCO_CITATION,
        notes=_OBJECTS_SPLIT,
    ),
    Collection(
        dataset="refcoco+",
        split_by="unc",
        title="RefCOCO+",
        description=_REFCOCO + "which words of location were not allowed: sentences describe how the object looks.",
        homepage=_REFER,
        citation=_REFCOCO_CITATION,
        notes=_IMAGES_SPLIT,
    ),
    Collection(
        dataset="refcocog",
        split_by="umd",
        title="RefCOCOg, split by UMD",
        description="Long sentences that refer to exactly one object in an image of COCO train2014.",
        homepage=_REFER,
        citation=f"{_GOOGLE_CITATION}\n{_UMD_CITATION}\n{COCO_CITATION}",
    ),
    Collection(
        dataset="refcocog",
        split_by="google",
        title="RefCOCOg, split by Google",
        description="Long sentences that refer to exactly one object in an image of COCO train2014.",
        homepage=_REFER,
        citation=f"{_GOOGLE_CITATION}\n{COCO_CITATION}",
        notes=_OBJECTS_SPLIT,
    ),
    *(
        Collection(
            dataset="refclef",
            split_by=split_by,
            title=f"RefClef, split by {author}",
            description="Sentences that refer to exactly one region of a photograph of the SAIAPR TC-12 collection, "
            "written by players of a game in which another player had to find the region.",
            homepage=_REFER,
            citation=_REFERIT_CITATION,
            image_terms="The images are those of SAIAPR TC-12 (ImageCLEF); its terms of use apply.",
            image_folder="saiapr_tc-12",
        )
        for split_by, author in (("unc", "UNC"), ("berkeley", "Berkeley"))
    ),
    Collection(
        dataset="ref-zom",
        split_by="final",
        title="Ref-ZOM",
        description="Sentences that refer to no object in an image, to one, or to many. The images come from COCO "
        "train2014 and val2014.",
        homepage="https://github.com/toggle1995/RIS-DMMI",
        citation="""@inproceedings{RefZOM,
  title     = {Beyond One-to-One: Rethinking the Referring Image Segmentation},
  author    = {Hu, Yutao and Wang, Qixiong and Shao, Wenqi and Xie, Enze and Li, Zhenguo and Han, Jungong and
               Luo, Ping},
  booktitle = {ICCV},
  year      = {2023}
}
"""
        + COCO_CITATION,
        image_folder="trainval2014",
        notes="""- Rename the official `Ref-ZOM(final).p` to `refs(final).p`, and put train2014 and val2014 into one
  folder of images.
- A sentence has no target where its ref has the source "zero".""",
        single_target=False,
    ),
)
COLLECTIONS = {collection.name: collection for collection in _ALL}
CONFIGS = tuple(COLLECTIONS)


def collection_of(config: str) -> Collection:
    """The collection of a configuration. Raises ValueError for an unknown name."""
    if config not in COLLECTIONS:
        raise ValueError(f"Unknown configuration {config!r}; choose one of {', '.join(COLLECTIONS)}.")
    return COLLECTIONS[config]
