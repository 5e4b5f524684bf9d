"""Pictures of a data set: a page of samples, drawn with pillow, and plots of statistics, which need matplotlib."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from grefcoco_data.annotations import targets
from grefcoco_data.atomic_files import new_file, write_text
from grefcoco_data.grefer import GRefer
from grefcoco_data.masks import decode_mask, xywh_to_xyxy

TARGET_COLOURS = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)
SAMPLES_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 15px sans-serif; margin: 2em; }} img {{ width: 100%; }}
figure {{ display: inline-block; width: 420px; margin: 0 1em 1em 0; }} figcaption {{ color: #444; }}</style>
<h1>{title}</h1>
{figures}
</html>
"""


def write_samples_page(rows: list[dict], folder: Path, title: str) -> Path:
    """Write a PNG for each expression row (as `load` gives it) and the page `index.html` that shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for row in rows:
        name = f"{title}-{row['sent_id']}.png"
        with new_file(folder / name) as temporary:
            draw_targets(row).save(temporary, format="PNG")
        count = f"{len(row['ann_ids'])} target{'s' * (len(row['ann_ids']) != 1)}"
        caption = f"sentence {row['sent_id']}, ref {row['ref_id']}, image {row['image_id']}, {count}"
        sentence = html.escape(row["sentence"])
        figures.append(
            f'<figure><img src="{name}" alt="{sentence}"><figcaption>{sentence}<br>{caption}</figcaption></figure>'
        )
    page = folder / "index.html"
    write_text(page, SAMPLES_PAGE.format(title=html.escape(title), figures="\n".join(figures)))
    return page


def draw_targets(row: dict) -> Image.Image:
    """The image of an expression row, dimmed, with the mask and the box of each target in a colour of its own."""
    pixels = np.asarray(row["image"], dtype=np.float32) * (0.8 if row["masks"] else 0.4)  # (height, width, 3)
    colours = [TARGET_COLOURS[number % len(TARGET_COLOURS)] for number in range(len(row["masks"]))]
    for rle, colour in zip(row["masks"], colours):
        inside = decode_mask(rle).astype(bool)
        pixels[inside] = pixels[inside] * 0.5 + np.array(colour) * 0.5
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for (left, top, right, bottom), colour in zip(xywh_to_xyxy(row["boxes"]).tolist(), colours):
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
    return picture


def sentence_statistics(refer: GRefer, split: str) -> dict[str, np.ndarray]:
    """`targets` and `words` of each sentence of a split; `mask_share` (% of the image) of each one with targets."""
    refs = [refer.Refs[ref_id] for ref_id in refer.getRefIds(split=split)]
    repeats = [len(ref["sentences"]) for ref in refs]
    shares = np.array([_mask_share(refer, ref) for ref in refs])
    return {
        "targets": np.repeat([len(targets(ref)) for ref in refs], repeats),
        "words": np.array([len(sentence["sent"].split()) for ref in refs for sentence in ref["sentences"]]),
        "mask_share": np.repeat(shares, repeats)[np.repeat(shares > 0, repeats)],
    }


def draw_statistics(statistics: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Write a PNG with histograms of `sentence_statistics`, one line per split.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("Plots need matplotlib: pip install 'grefcoco[plot]'.") from error
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {"targets": "targets", "words": "words", "mask_share": "area of the targets, % of the image"}
    for axes, (name, title) in zip(panels, titles.items()):
        top = max((columns[name].max(initial=1) for columns in statistics.values()), default=1)
        bins = np.linspace(0, 100, 26) if name == "mask_share" else np.arange(0, top + 2) - 0.5
        for split, columns in statistics.items():
            weights = np.full(len(columns[name]), 100 / max(1, len(columns[name])))
            axes.hist(np.minimum(columns[name], bins[-1]), bins, weights=weights, histtype="step", label=split)
        axes.set(xlabel=title, ylabel="% of sentences")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _mask_share(refer: GRefer, ref: dict) -> float:
    image = refer.Imgs[ref["image_id"]]
    return 100 * sum(refer.Anns[key]["area"] for key in targets(ref)) / (image["width"] * image["height"])
