"""Speed of ReLA beside the original code and its own plain forms: `python -m benchmarks.model --original FOLDER`.

Swin-B at 480 x 480 with random weights, one thread, processor time, the two sides alternating in one process and their
outputs compared. Without the original's folder its rows are left out. `--compile` adds torch.compile, which takes
minutes; `--only WORD` keeps the rows whose name has the word. On a CUDA machine the rows are throughput, memory and
the share of the chip's measured bf16 rate instead.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from benchmarks.original_rela import OriginalRela
from modeling.configuration_rela import RelaConfig
from modeling.convert_rela import convert_state_dict
from modeling.modeling_rela import RelaModel
from modeling.pixel_decoder_rela import gather_points, pixel_centres

SIDE, TOKENS, SENTENCES = 480, 20, 14
GIGAFLOP = {"forward": 262.6, "forward and backward": 771.7}  # Swin-B, one image and one sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--original", type=Path, help="checkout of the original ReLA repository")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the best counts")
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
        if torch.cuda.is_available():
            measure_gpu(model, options.compile, options.repeats)
        else:
            measure_cpu(model, original, options)


def measure_cpu(model: RelaModel, original: OriginalRela | None, options: argparse.Namespace) -> None:
    """Print one Markdown row per comparison: what, before, after, ratio, largest difference."""
    inputs, repeats = made_inputs(1, 1), options.repeats
    side = "eager" if original is None else "original"
    before = masks(model, inputs) if original is None else lambda: original(**inputs)["pred_masks"]

    def compiled(runner: RelaModel) -> Callable[[], torch.Tensor]:
        return masks(torch.compile(runner, fullgraph=True), inputs)

    # Each entry makes its two sides only when it is wanted.
    comparisons = {
        "region decoder: original / here": lambda: region_decoders(original, model, inputs),
        "whole forward, fp32: original / here": lambda: (before, masks(model, inputs)),
        "deformable core: transformers' grid_sample / here": deformable_cores,
        "14 sentences on one image: one by one / together": lambda: shared_image(model),
        f"bf16, fragile parts fp32: {side} fp32 / here": lambda: (before, masks(half_precision(model), inputs)),
        "a matrix product, the limit of bf16: fp32 / bf16": matrix_products,
        f"compiled, fp32: {side} / here": lambda: (before, compiled(model)),
        f"compiled, bf16: {side} fp32 / here": lambda: (before, compiled(half_precision(model))),
    }
    print("| what | before, s | here, s | ratio | difference |\n|---|---|---|---|---|")
    for name, sides in comparisons.items():
        possible = (original or "original / " not in name) and (options.compile or "compiled" not in name)
        if possible and options.only in name:
            row(name, *sides(), repeats)
    a, b = matrix_sides()
    rate = 2 * len(a) ** 3 / processor_seconds(lambda: nn.functional.linear(a, b), repeats)
    work = GIGAFLOP["forward"]
    print(
        f"\nThe forward's {work} GFLOP at the {rate / 1e9:.0f} GFLOP/s of an fp32 product: {work * 1e9 / rate:.2f} s"
    )


def measure_gpu(model: RelaModel, compiled: bool, repeats: int) -> None:
    """Print throughput, peak memory and share of the measured bf16 rate, of inference and training."""
    model.cuda()
    rate = bf16_rate()
    print(f"measured bf16 rate: {rate / 1e12:.0f} TFLOP/s")
    print("| what | images/s | peak GiB | share of the rate |\n|---|---|---|---|")
    kinds = [("eager", model)] + ([("compiled", torch.compile(model))] if compiled else [])
    for kind, runner in kinds:
        for work, batch in (("forward", 32), ("forward and backward", 16)):
            inputs = {name: value.cuda() for name, value in made_inputs(batch, batch).items()}
            labels = {"masks": torch.zeros(batch, SIDE, SIDE).cuda(), "no_target": torch.zeros(batch).cuda()}
            labels = labels if work != "forward" else None

            def step(runner: Callable = runner, inputs: dict = inputs, labels: dict | None = labels) -> None:
                with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(labels is not None):
                    outputs = runner(**inputs, labels=labels)
                if labels is not None:
                    outputs.loss.backward()

            torch.cuda.reset_peak_memory_stats()
            seconds = cuda_seconds(step, repeats)
            memory = torch.cuda.max_memory_allocated() / 2**30
            share = GIGAFLOP[work] * 1e9 * batch / seconds / rate
            print(f"| {kind} {work}, batch {batch} | {batch / seconds:.1f} | {memory:.1f} | {share:.1%} |")


def region_decoders(original: OriginalRela, model: RelaModel, inputs: dict) -> tuple[Callable, Callable]:
    """Both region decoders on the same memory."""
    output = model(**inputs, output_hidden_states=True)
    levels, features, text = list(output.pixel_hidden_states), output.mask_features, output.text_hidden_state
    words = text.permute(0, 2, 1)
    return (
        lambda: original.sem_seg_head.predictor(levels, features, words)["pred_masks"],
        lambda: model.region_decoder(levels, features, text, inputs["attention_mask"], False)[-1].masks,
    )


def deformable_cores() -> tuple[Callable, Callable]:
    """Both sampling kernels at the sizes of a 480 x 480 image."""
    shapes = [(15, 15), (30, 30), (60, 60)]
    sides = torch.tensor([(width, height) for height, width in shapes])
    values = torch.randn(1, sum(h * w for h, w in shapes), 8, 32)
    places = pixel_centres(shapes, values)[:, None, None, None] * sides[:, None] - 0.5
    places = places + 2 * torch.randn(1, values.shape[1], 8, 3, 4, 2)
    weights = torch.rand(1, values.shape[1], 8, 3, 4).flatten(3).softmax(-1).unflatten(-1, (3, 4))
    stock, locations, shapes_tensor = MultiScaleDeformableAttention(), (places + 0.5) / sides[:, None], sides.flip(1)
    return (
        lambda: stock(values, shapes_tensor, shapes, None, locations, weights, 64),
        lambda: gather_points(values, shapes, places, weights).flatten(2),
    )


def shared_image(model: RelaModel) -> tuple[Callable, Callable]:
    """Fourteen sentences about one image: one call each, or one call."""
    inputs = made_inputs(1, SENTENCES)
    texts = [(inputs["input_ids"][i : i + 1], inputs["attention_mask"][i : i + 1]) for i in range(SENTENCES)]
    together = {**inputs, "image_index": torch.zeros(SENTENCES, dtype=torch.long)}
    return lambda: torch.cat([model(inputs["pixel_values"], *text).pred_masks for text in texts]), masks(
        model, together
    )


def matrix_sides(size: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, size), torch.randn(size, size)


def matrix_products() -> tuple[Callable, Callable]:
    """The same product in both types: no model gains more from bf16 than its products do."""
    a, b = matrix_sides()
    c, d = a.bfloat16(), b.bfloat16()
    return lambda: nn.functional.linear(a, b), lambda: nn.functional.linear(c, d)


def half_precision(model: RelaModel) -> RelaModel:
    """A bf16 copy whose fragile parts stay in fp32, as `from_pretrained(dtype=torch.bfloat16)` gives."""
    half = RelaModel(model.config).to(torch.bfloat16)
    for part in (half.text_encoder, half.pixel_decoder, half.region_decoder.heads):
        part.float()
    half.load_state_dict(model.state_dict())
    return half.eval()


def made_inputs(images: int, sentences: int) -> dict[str, torch.Tensor]:
    attention_mask = torch.ones(sentences, TOKENS, dtype=torch.long)
    attention_mask[:, 12:] = 0
    return {
        "pixel_values": torch.randn(images, 3, SIDE, SIDE),
        "input_ids": torch.randint(1000, 20000, (sentences, TOKENS)),
        "attention_mask": attention_mask,
    }


def masks(model: RelaModel, inputs: dict) -> Callable[[], torch.Tensor]:
    return lambda: model(**inputs).pred_masks


def row(what: str, before: Callable, after: Callable, repeats: int) -> None:
    """Alternate the two sides, print the best of each and how far their outputs differ, relative to the largest."""
    expected, found = before(), after()
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    slow = fast = float("inf")
    for _ in range(repeats):
        slow, fast = min(slow, processor_seconds(before)), min(fast, processor_seconds(after))
    print(f"| {what} | {slow:.3f} | {fast:.3f} | {slow / fast:.2f} | {difference:.0e} |", flush=True)


def processor_seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """The best of a number of calls."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def bf16_rate(size: int = 8192) -> float:
    """FLOP/s of a large bf16 matrix product on this GPU."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / cuda_seconds(lambda: a @ a, 20)


def cuda_seconds(function: Callable[[], object], repeats: int) -> float:
    """Mean time of a call, after three to warm up."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    main()
