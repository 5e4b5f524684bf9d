"""Measure the speed of ReLA against the original code: `python -m benchmarks.model --original FOLDER`.

Swin-B at 480 x 480 with random weights, one thread, CPU time. The two sides of a comparison alternate in one process,
and their outputs are compared. Without `--original`, the rows that need the original code are skipped. `--compile`
adds torch.compile, which takes minutes. `--only WORD` selects the rows whose name contains the word.
`benchmarks.gpu` measures a GPU.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from benchmarks.original_rela import OriginalRela
from grefcoco_data.arguments import ArgumentParser
from modeling.configuration_rela import RelaConfig
from modeling.convert_rela import convert_state_dict
from modeling.modeling_rela import RelaModel
from modeling.pixel_decoder_rela import gather_points, pixel_centres

SIDE, TOKENS, SENTENCES = 480, 20, 14
GIGAFLOP = 262.6  # of the forward pass of Swin-B, one image and one sentence


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, help="checkout of the original ReLA repository")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the minimum is reported")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--only", default="", help="measure only the rows whose name contains this")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    original = OriginalRela(options.original).eval() if options.original else None
    model = RelaModel(RelaConfig()).eval()
    if original is not None:
        model.load_state_dict(convert_state_dict(original.state_dict()))
    with torch.no_grad():
        measure_cpu(model, original, options)


def measure_cpu(model: RelaModel, original: OriginalRela | None, options: argparse.Namespace) -> None:
    """Print one Markdown row per comparison: name, seconds before and here, ratio, largest difference."""
    inputs, repeats = random_inputs(1, 1), options.repeats
    side = "eager" if original is None else "original"
    before = mask_call(model, inputs) if original is None else lambda: original(**inputs)["pred_masks"]

    def compiled(runner: RelaModel) -> Callable[[], torch.Tensor]:
        return mask_call(torch.compile(runner, fullgraph=True), inputs)

    # Lazy: only the selected comparisons create their models and inputs.
    comparisons = {
        "region decoder: original / here": lambda: region_decoders(original, model, inputs),
        "whole forward, fp32: original / here": lambda: (before, mask_call(model, inputs)),
        "deformable core: transformers' grid_sample / here": deformable_cores,
        "14 sentences on one image: one by one / together": lambda: shared_image(model),
        f"bf16, sensitive parts in fp32: {side} fp32 / here": lambda: (before, mask_call(bf16_copy(model), inputs)),
        "one matrix product, the limit of bf16: fp32 / bf16": matrix_products,
        f"compiled, fp32: {side} / here": lambda: (before, compiled(model)),
        f"compiled, bf16: {side} fp32 / here": lambda: (before, compiled(bf16_copy(model))),
    }
    print("| comparison | before, s | here, s | ratio | difference |\n|---|---|---|---|---|")
    for name, sides in comparisons.items():
        available = (original or "original / " not in name) and (options.compile or "compiled" not in name)
        if available and options.only in name:
            print_row(name, *sides(), repeats)
    a, b = random_matrices()
    rate = 2 * len(a) ** 3 / cpu_seconds(lambda: nn.functional.linear(a, b), repeats)
    seconds = GIGAFLOP * 1e9 / rate
    print(f"\nForward pass: {GIGAFLOP} GFLOP; at the {rate / 1e9:.0f} GFLOP/s of an fp32 product: {seconds:.2f} s")


def region_decoders(original: OriginalRela, model: RelaModel, inputs: dict) -> tuple[Callable, Callable]:
    """Return both region decoders on the same features."""
    output = model(**inputs, output_hidden_states=True)
    levels, features, text = list(output.pixel_hidden_states), output.mask_features, output.text_hidden_state
    words = text.permute(0, 2, 1)
    return (
        lambda: original.sem_seg_head.predictor(levels, features, words)["pred_masks"],
        lambda: model.region_decoder(levels, features, text, inputs["attention_mask"], False)[-1].masks,
    )


def deformable_cores() -> tuple[Callable, Callable]:
    """Return both sampling functions at the sizes of a 480 x 480 image."""
    shapes = [(15, 15), (30, 30), (60, 60)]
    sizes = torch.tensor([(width, height) for height, width in shapes])  # (levels, 2)
    values = torch.randn(1, sum(h * w for h, w in shapes), 8, 32)
    points = pixel_centres(shapes, values)[:, None, None, None] * sizes[:, None] - 0.5
    points = points + 2 * torch.randn(1, values.shape[1], 8, 3, 4, 2)
    weights = torch.rand(1, values.shape[1], 8, 3, 4).flatten(3).softmax(-1).unflatten(-1, (3, 4))
    transformers_core, shapes_tensor = MultiScaleDeformableAttention(), sizes.flip(1)
    locations = (points + 0.5) / sizes[:, None]
    return (
        lambda: transformers_core(values, shapes_tensor, shapes, None, locations, weights, 64),
        lambda: gather_points(values, shapes, points, weights).flatten(2),
    )


def shared_image(model: RelaModel) -> tuple[Callable, Callable]:
    """Return two ways to run fourteen sentences on one image: one call per sentence, and one call for all."""
    inputs = random_inputs(1, SENTENCES)
    texts = [(inputs["input_ids"][i : i + 1], inputs["attention_mask"][i : i + 1]) for i in range(SENTENCES)]
    together = {**inputs, "image_index": torch.zeros(SENTENCES, dtype=torch.long)}

    def one_by_one() -> torch.Tensor:
        return torch.cat([model(inputs["pixel_values"], *text).pred_masks for text in texts])

    return one_by_one, mask_call(model, together)


def random_matrices(size: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, size), torch.randn(size, size)


def matrix_products() -> tuple[Callable, Callable]:
    """Return the same product in fp32 and bf16: its ratio is the upper limit of any gain from bf16."""
    a, b = random_matrices()
    c, d = a.bfloat16(), b.bfloat16()
    return lambda: nn.functional.linear(a, b), lambda: nn.functional.linear(c, d)


def bf16_copy(model: RelaModel) -> RelaModel:
    """Return a bf16 copy with sensitive parts in fp32, as `from_pretrained(dtype=torch.bfloat16)` does."""
    copy = RelaModel(model.config).to(torch.bfloat16)
    for part in (copy.text_encoder, copy.pixel_decoder, copy.region_decoder.heads):
        part.float()
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def random_inputs(images: int, sentences: int) -> dict[str, torch.Tensor]:
    attention_mask = torch.ones(sentences, TOKENS, dtype=torch.long)
    attention_mask[:, 12:] = 0
    return {
        "pixel_values": torch.randn(images, 3, SIDE, SIDE),
        "input_ids": torch.randint(1000, 20000, (sentences, TOKENS)),
        "attention_mask": attention_mask,
    }


def mask_call(model: RelaModel, inputs: dict) -> Callable[[], torch.Tensor]:
    """Return a function without arguments that computes the masks of `inputs`."""
    return lambda: model(**inputs).pred_masks


def print_row(name: str, before: Callable, after: Callable, repeats: int) -> None:
    """Run the two sides in turn; print the minimum times and the largest difference of the outputs (relative)."""
    expected, actual = before(), after()
    difference = ((actual - expected).abs().max() / expected.abs().max()).item()
    seconds_before = seconds_after = float("inf")
    for _ in range(repeats):
        seconds_before = min(seconds_before, cpu_seconds(before))
        seconds_after = min(seconds_after, cpu_seconds(after))
    ratio = seconds_before / seconds_after
    print(f"| {name} | {seconds_before:.3f} | {seconds_after:.3f} | {ratio:.2f} | {difference:.0e} |", flush=True)


def cpu_seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Return the minimum CPU time of a call over `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
