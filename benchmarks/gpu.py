"""Measure what one GPU can tell about training and inference: `python -m benchmarks.gpu --out FILE.json`.

No data set and no network: made batches, random weights of the published sizes. The file holds rates of the chip, rows
of throughput and memory, the time by part, candidates of the deformable core, and the host synchronisations of a step.
Rows that no time is left for are listed under "not_reached". Without a GPU the code runs at tiny sizes, as a test.
"""

from __future__ import annotations

import gc
import itertools
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from grefcoco_data.arguments import ArgumentParser
from grefcoco_data.atomic_files import write_text
from modeling.configuration_mdetr import MdetrConfig
from modeling.configuration_rela import RelaConfig
from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from modeling.pixel_decoder_rela import gather_points, pixel_centres
from training.config import read_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST_ROW = 25  # seconds after the limit in which the last row may end
TOKENS, WORDS = 20, 12  # of a sentence, the others are padding
TINY_TEXT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_TEXT |= {"intermediate_size": 32, "max_position_embeddings": 40}
TINY_SWIN = {
    "stage_channels": [16, 32, 32, 32],
    "window_heads": [1, 2, 2, 2],
    "depths": [1, 1, 2, 1],
    "window_size": 4,
}
TINY_SWIN |= {"pixel_decoder_size": 32, "mask_size": 32, "hidden_size": 32, "norm_groups": 8, "decoder_layers": 3}
TINY_MDETR = {"stem_channels": 16, "bottleneck_channels": [16] * 4, "stage_channels": [16] * 4, "depths": [1] * 4}
TINY_MDETR |= {"hidden_size": 32, "num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
PARTS = ("text_encoder", "vision_encoder.trunk", "vision_encoder.fusions", "pixel_decoder", "region_decoder")
PARTS += ("object_finder", "instance_chooser", "backbone", "encoder", "decoder")


@dataclass(frozen=True)
class Case:
    """One row: a model at a batch size."""

    model: str  # a key of MODELS
    precision: str  # fp32, tf32, bf16 or fp16; the last two by autocast
    work: str  # "forward", or "step" with loss, backward pass, clipping and AdamW
    batch: int  # sentences
    images: int  # in the batch
    compiled: bool = False


def swin(recipe: str) -> RelaModel:
    """A published ReLA with random weights."""
    fields = read_recipe(RECIPES / f"{recipe}.yaml")["model"]
    return RelaModel(RelaConfig(**fields if DEVICE == "cuda" else fields | TINY_SWIN | {"text_config": TINY_TEXT}))


def unified() -> RelaModel:
    """The model of `make demo`."""
    fields = read_recipe(RECIPES / "unified.yaml")["model"]
    text = {**fields["text_config"], "vocab_size": 100}
    return RelaModel(RelaConfig(**fields | {"text_config": text, "num_categories": 8}))


def mdetr() -> MdetrModel:
    """The published MDETR with random weights."""
    return MdetrModel(MdetrConfig(**{} if DEVICE == "cuda" else TINY_MDETR | {"text_config": TINY_TEXT}))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[int, int]]] = {  # and the (height, width) of its images
    "swin_base": (partial(swin, "rela_swin_base"), (480, 480) if DEVICE == "cuda" else (64, 64)),
    "swin_tiny": (partial(swin, "rela_swin_tiny"), (480, 480) if DEVICE == "cuda" else (64, 64)),
    "unified": (unified, (128, 128)),
    "mdetr": (mdetr, (800, 1066) if DEVICE == "cuda" else (64, 96)),
}


def cases() -> list[Case]:
    """All rows, the most important first."""
    if DEVICE == "cpu":
        rows = [Case(name, "fp32", work, 2, 2) for name in MODELS for work in ("step", "forward")]
        return [*rows, Case("swin_base", "bf16", "step", 2, 1), Case("swin_tiny", "fp32", "step", 5, 5, compiled=True)]
    rows = [Case("swin_base", "bf16", "step", batch, batch) for batch in (48, 8, 16, 32, 64)]
    rows += [Case("swin_base", "bf16", "step", 48, 12), Case("swin_base", "bf16", "forward", 64, 64)]
    rows += [Case("swin_base", precision, "step", 16, 16) for precision in ("tf32", "fp16", "fp32")]
    rows += [Case("swin_base", "bf16", work, 48, 48, compiled=True) for work in ("step", "forward")]
    rows += [Case("unified", precision, "step", 32, 10) for precision in ("bf16", "tf32")]
    rows += [Case("unified", "bf16", "step", 256, 64), Case("unified", "bf16", "forward", 256, 64)]
    rows += [Case("mdetr", "bf16", "step", batch, batch) for batch in (4, 16)]
    rows += [Case("mdetr", "tf32", "step", 4, 4), Case("mdetr", "bf16", "forward", 16, 16)]
    rows += [Case("swin_tiny", "bf16", "step", batch, batch) for batch in (48, 8, 64)]
    rows += [Case("swin_tiny", "bf16", "forward", 64, 64), Case("swin_base", "bf16", "step", 48, 12, compiled=True)]
    rest = itertools.product(("swin_base", "swin_tiny"), ("tf32", "fp16", "fp32"), ("forward", "step"), (8, 32, 64))
    rows += [Case(model, precision, work, batch, batch) for model, precision, work, batch in rest]
    return rows + [Case(name, "bf16", "step", 16, 16, compiled=True) for name in ("swin_tiny", "unified", "mdetr")]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written again after every row")
    parser.add_argument("--minutes", type=float, default=8.5, help="no row is started after this time")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    result: dict[str, object] = {"device": device_name(), "torch": torch.__version__, "rates": rates(), "rows": []}
    sections = {
        "deformable_core": deformable_cores,
        "parts": partial(parts, "swin_base", 48 if DEVICE == "cuda" else 2),
        "synchronisations": synchronisations,
    }
    tasks: list[tuple[str, Callable[[], object]]] = [
        (json.dumps(asdict(case)), partial(row, case, result["rates"]["bf16_tflops"])) for case in cases()
    ]
    tasks[3:3] = sections.items()  # after the most important rows
    result["not_reached"] = [name for name, _ in tasks]
    signal.signal(signal.SIGALRM, out_of_time)
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    for name, task in tasks:
        if time.monotonic() > deadline:
            break
        signal.setitimer(signal.ITIMER_REAL, deadline - time.monotonic() + LAST_ROW)
        value = attempt(task)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if name in sections:
            result[name] = value
        else:
            result["rows"].append({**json.loads(name), **value})
        result["not_reached"].remove(name)
        write_text(options.out, json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(value)[:300], flush=True)


def out_of_time(*arguments: object) -> None:
    """Ends the last row, which may be compiling for minutes."""
    raise TimeoutError("no time is left")


def attempt(task: Callable[[], object]) -> object:
    """What the task gives, or {"error": text}: a row that does not fit in memory must not end the others."""
    try:
        return task()
    except Exception as error:  # of memory, of a compiler, of a kernel that a chip lacks
        return {"error": " ".join(str(error).split())[:500]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def rates() -> dict[str, float]:
    """Measured rates of the chip: matrix products in TFLOP/s, and memory in TB/s read and written."""
    side = 8192 if DEVICE == "cuda" else 128
    results = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "high"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a = torch.randn(side, side, device=DEVICE, dtype=dtype)
        results[f"{name}_tflops"] = 2 * side**3 / seconds_of(lambda a=a: a @ a, 10) / 1e12
    results["copy_tb_per_s"] = 2 * a.nbytes / seconds_of(lambda: a.clone(), 10) / 1e12
    return results


def row(case: Case, rate: float) -> dict[str, object]:
    """Throughput, peak memory, and the fraction of the measured bf16 rate."""
    step, model, batch = build(case)
    with FlopCounter() as counter:  # also the first warm-up
        step(model)
    runner = torch.compile(model, backend="inductor" if DEVICE == "cuda" else "eager") if case.compiled else model
    start = time.perf_counter()
    step(runner)
    synchronize()
    first = time.perf_counter() - start
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(lambda: step(runner), 8 if DEVICE == "cuda" else 1)
    result = {
        "ms": round(1e3 * seconds, 3),
        "sentences_per_s": round(case.batch / seconds, 2),
        "images_per_s": round(case.images / seconds, 2),
        "gflop": round(counter.flop / 1e9, 2),
        "fraction_of_bf16_rate": round(counter.flop / seconds / 1e12 / rate, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if DEVICE == "cuda" else None,
        "first_call_s": round(first, 2),
    }
    if case.compiled:  # a batch with another number of images compiles once more, with a free size; then none again
        graphs = []
        for fewer in (1, 2, 3):
            step(runner, made_batch(case.model, case.batch, max(1, case.images - fewer), batch["labels"] is not None))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        result["graphs_after_other_numbers_of_images"] = graphs
    return result


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention."""

    flop = 0

    def __torch_dispatch__(self, function: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.flop += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def build(case: Case) -> tuple[Callable, PreTrainedModel, dict[str, object]]:
    """A function that runs one step of a model on its batch, the model, and the batch."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if case.precision == "fp32" else "high")
    training = case.work == "step"
    model = MODELS[case.model][0]().to(DEVICE).train(training)
    made = made_batch(case.model, case.batch, case.images, training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if training else None
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision)
    scaler = torch.amp.GradScaler(DEVICE, enabled=case.precision == "fp16")

    def step(runner: Callable, batch: dict[str, object] = made) -> None:
        with torch.set_grad_enabled(training), torch.autocast(DEVICE, half, enabled=half is not None):
            outputs = runner(**batch)
        if training:
            scaler.scale(outputs.loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            with record_function("optimizer"):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return step, model, made


def made_batch(name: str, sentences: int, images: int, training: bool) -> dict[str, object]:
    """A random batch of the model `name`; sentences are about the images in turn."""
    height, width = MODELS[name][1]
    attention_mask = (torch.arange(TOKENS) < WORDS).long().expand(sentences, -1)
    boxes = torch.rand(sentences, 3, 4) * 0.3 + 0.2
    labels: dict[str, torch.Tensor] = {"no_target": torch.arange(sentences) % 7 == 0}
    if name == "mdetr":
        positive_map = torch.zeros(sentences, 3, 256)
        positive_map[..., 2] = 1
        labels |= {"boxes": boxes, "positive_map": positive_map, "is_final": torch.ones(sentences, 3)}
        labels["num_boxes"] = torch.full((sentences,), 3)
    else:
        labels["masks"] = (torch.rand(sentences, height, width) > 0.9).to(torch.uint8)
    if name == "unified":
        labels["categories"] = torch.randint(0, 8, (images, height, width))
        labels["object_boxes"], labels["num_objects"] = boxes[:images], torch.full((images,), 3)
        labels["object_masks"] = (torch.rand(images, 3, height // 4, width // 4) > 0.9).to(torch.uint8)
        labels["targets"] = torch.rand(sentences, 3) > 0.5
    batch = {
        "pixel_values": torch.randn(images, 3, height, width),
        "input_ids": torch.randint(5, 100, (sentences, TOKENS)),
        "attention_mask": attention_mask,
        "image_index": torch.arange(sentences) % images,
        "labels": labels if training else None,
    }
    return on_device(batch)


def on_device(batch: object) -> object:
    """All tensors of nested dictionaries on the device."""
    if isinstance(batch, dict):
        return {name: on_device(value) for name, value in batch.items()}
    return batch.to(DEVICE) if isinstance(batch, torch.Tensor) else batch


def deformable_cores() -> list[dict[str, object]]:
    """Milliseconds and memory of the candidates of the deformable core, forward and backward, one layer at 480 px."""
    shapes, batches, repeats = ([(15, 15), (30, 30), (60, 60)], (8, 48), 5)
    if DEVICE == "cpu":
        shapes, batches, repeats = ([(2, 2), (4, 4), (8, 8)], (2,), 1)
    sizes = torch.tensor([(width, height) for height, width in shapes], device=DEVICE)  # (levels, 2)
    core, shapes_tensor = MultiScaleDeformableAttention(), sizes.flip(1)
    rows = []
    for batch, dtype in itertools.product(batches, (torch.float32, torch.bfloat16)):
        pixels = sum(height * width for height, width in shapes)
        values = torch.randn(batch, pixels, 8, 32, device=DEVICE, dtype=dtype, requires_grad=True)
        centres = pixel_centres(shapes, values.float())[:, None, None, None] * sizes[:, None] - 0.5
        points = (centres + 2 * torch.randn(batch, pixels, 8, 3, 4, 2, device=DEVICE)).requires_grad_()
        weights = torch.rand(batch, pixels, 8, 12, device=DEVICE).softmax(-1).unflatten(-1, (3, 4)).requires_grad_()
        candidates = {
            "embedding_bag": lambda v=values, p=points, w=weights: gather_points(v, shapes, p, w),
            "grid_sample": lambda v=values, p=points, w=weights: core(
                v, shapes_tensor, shapes, None, ((p + 0.5) / sizes[:, None]).to(v.dtype), w.to(v.dtype), 64
            ),
        }
        if DEVICE == "cuda" and find_spec("triton"):  # the module cannot be imported without it
            from benchmarks.deformable_triton import GatherPoints

            candidates["triton"] = lambda v=values, p=points, w=weights: GatherPoints.apply(
                v, p.to(v.dtype), w.to(v.dtype), tuple(shapes)
            )
        if dtype == torch.bfloat16:
            del candidates["embedding_bag"]  # it takes weights and values of one type, and weights need fp32
        for name, candidate in candidates.items():
            inputs = (values, points, weights)
            place = {"candidate": name, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
            rows.append({**place, **attempt(partial(core_row, candidate, inputs, repeats))})
    return rows


def core_row(
    candidate: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...], repeats: int
) -> dict[str, float]:
    """Forward, and forward with backward, of one candidate."""

    def both() -> None:
        torch.autograd.grad(candidate().float().sum(), inputs)

    with torch.no_grad():
        forward = seconds_of(candidate, repeats)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    total = seconds_of(both, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    return {"forward_ms": 1e3 * forward, "forward_and_backward_ms": 1e3 * total, "peak_gib": peak}


def parts(name: str, batch: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a bf16 step: by part of the model in its forward pass, by node in backward, by kernel."""
    step, model, _ = build(Case(name, "bf16", "step", batch, batch))
    step(model)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with ranges(model), profile(activities=activities) as profiled:
        step(model)
        synchronize()
    total, own = ("device_time_total", "self_device_time_total") if DEVICE == "cuda" else ("cpu_time_total",) * 2
    events, prefix = profiled.key_averages(), "autograd::engine::evaluate_function: "
    tables = {
        "forward_parts": {e.key: getattr(e, total) for e in events if e.key in (*PARTS, "optimizer")},
        "backward_nodes": {e.key.removeprefix(prefix): getattr(e, total) for e in events if e.key.startswith(prefix)},
        "kernels": {e.key: getattr(e, own) for e in events if not e.key.startswith(prefix)},
    }
    return {kind: _largest(table) for kind, table in tables.items()}


def _largest(table: dict[str, float], number: int = 30) -> dict[str, float]:
    """The largest times of a table in microseconds, as milliseconds."""
    ordered = sorted(table.items(), key=lambda item: -item[1])[:number]
    return {name: round(time / 1e3, 3) for name, time in ordered if time}


@contextmanager
def ranges(model: PreTrainedModel) -> Iterator[None]:
    """Name the forward passes of the model's `PARTS` for the profiler."""
    handles, opened = [], []

    def enter(name: str, *arguments: object) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def leave(*arguments: object) -> None:
        opened.pop().__exit__(None, None, None)

    # a list of modules is never called itself: its members are named together
    for name, module in ((name, model.get_submodule(name)) for name in PARTS if _has(model, name)):
        for member in module if isinstance(module, nn.ModuleList) else [module]:
            called = member.layers if name == "vision_encoder.trunk" else [member]
            for one in called:
                handles += [one.register_forward_pre_hook(partial(enter, name)), one.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has(model: PreTrainedModel, name: str) -> bool:
    """Whether the model has a submodule of this name that is not None."""
    return any(key == name for key, _ in model.named_modules())


def synchronisations() -> dict[str, int | None]:
    """How often the host waits for the device in a step, and in a forward pass without labels; None without a GPU."""
    counts: dict[str, int | None] = {}
    for name, work in itertools.product(MODELS, ("step", "forward")):
        step, model, _ = build(Case(name, "bf16", work, 2, 2))
        step(model)
        counts[f"{name} {work}"] = count_synchronisations(partial(step, model)) if DEVICE == "cuda" else None
    return counts


def count_synchronisations(function: Callable[[], object]) -> int:
    """The warnings of CUDA's synchronisation debug mode during a call."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def seconds_of(function: Callable[[], object], repeats: int) -> float:
    """The mean time of a call, after one call to warm up."""
    function()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) / repeats


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
