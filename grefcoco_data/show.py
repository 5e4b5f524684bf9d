"""Pictures of a data set: a page of samples, drawn with pillow, and plots of statistics, which need matplotlib."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
SENTENCE_PANELS = {  # plots of `sentence_statistics`
    "targets": ("targets", "sentences"),
    "words": ("words", "sentences"),
    "mask_share": ("area of the targets, % of the image", "sentences"),
}
MAX_COUNT_BINS = 50  # larger numbers share bins
SAMPLES_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>:root {{ color-scheme: light dark; }} body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; }}
main {{ display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }}
figure {{ margin: 0; }} img {{ width: 100%; border-radius: 6px; }} figcaption {{ overflow-wrap: anywhere; }}
small {{ opacity: .75; }}</style>
<h1>{title}</h1>
<p>{subtitle}</p>
<main>
{figures}
</main>
</html>
"""


def write_samples_page(rows: list[dict], folder: Path, split: str, title: str, subtitle: str) -> Path:
    """Write a PNG for each expression row (as `load` gives it) and the page `index.html` that shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, names = [], set()
    for row in rows:
        name = f"{split}-{row['sent_id']}.png"
        if name in names:  # ids that restart with each image
            name = f"{split}-{row['image_id']}-{row['sent_id']}-{len(names)}.png"
        names.add(name)
        with new_file(folder / name) as temporary:
            draw_targets(row).save(temporary, format="PNG")
        count = f"{len(row['ann_ids'])} target{'s' * (len(row['ann_ids']) != 1)}"
        caption = f"sentence {row['sent_id']}, ref {row['ref_id']}, image {row['image_id']}, {count}"
        sentence = html.escape(row["sentence"])
        figures.append(
            f'<figure><img src="{name}" alt="{sentence}" loading="lazy">'
            f"<figcaption>{sentence}<br><small>{caption}</small></figcaption></figure>"
        )
    page = folder / "index.html"
    texts = {"title": html.escape(title), "subtitle": html.escape(subtitle)}
    write_text(page, SAMPLES_PAGE.format(**texts, figures="\n".join(figures)))
    return page


def draw_targets(row: dict) -> Image.Image:
    """The image of an expression row, dimmed, with the mask and the box of each target in a colour of its own.

    The word "none" is written on an image without targets.
    """
    pixels = np.asarray(row["image"], dtype=np.float32) * (0.8 if row["masks"] else 0.4)  # (height, width, 3)
    colours = [TARGET_COLOURS[number % len(TARGET_COLOURS)] for number in range(len(row["masks"]))]
    for rle, colour in zip(row["masks"], colours):
        inside = decode_mask(rle).astype(bool)
        pixels[inside] = pixels[inside] * 0.5 + np.array(colour) * 0.5
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for (left, top, right, bottom), colour in zip(xywh_to_xyxy(row["boxes"]).tolist(), colours):
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
    if not row["masks"]:
        font = ImageFont.load_default(max(10, min(picture.size) // 6))
        middle = (picture.width / 2, picture.height / 2)
        draw.text(middle, "none", "white", font, anchor="mm", stroke_width=1, stroke_fill="black")
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


def draw_statistics(
    statistics: dict[str, dict[str, np.ndarray]], path: Path, panels: dict[str, tuple[str, str]] = SENTENCE_PANELS
) -> None:
    """Write a PNG with histograms, one line per split.

    Args:
        statistics: by split and name, such as `sentence_statistics`.
        path: of the PNG.
        panels: by name of what is drawn, what it is and of what.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("Plots need matplotlib: pip install 'grefcoco[plot]'.") from error
    figure = Figure(figsize=(13 / 3 * len(panels), 3.4), layout="constrained")
    every_axes = figure.subplots(1, len(panels))
    for axes, (name, (title, unit)) in zip(every_axes, panels.items()):
        values = np.concatenate([columns[name] for columns in statistics.values()] or [np.ones(1)])
        top = np.ceil(np.quantile(values, 0.995)) if len(values) else 1  # the last bin holds the few larger ones
        is_count = np.issubdtype(values.dtype, np.integer) and top <= MAX_COUNT_BINS
        bins = np.arange(0, top + 2) - 0.5 if is_count else np.linspace(0, max(top, 1), 26)
        for split, columns in statistics.items():
            weights = np.full(len(columns[name]), 100 / max(1, len(columns[name])))
            axes.hist(np.minimum(columns[name], bins[-1]), bins, weights=weights, histtype="step", label=split)
        axes.set(xlabel=title, ylabel=f"% of {unit}")
        axes.spines[["top", "right"]].set_visible(False)
    every_axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _mask_share(refer: GRefer, ref: dict) -> float:
    image = refer.Imgs[ref["image_id"]]
    return 100 * sum(refer.Anns[key]["area"] for key in targets(ref)) / (image["width"] * image["height"])
