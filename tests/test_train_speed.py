"""What keeps a training step fast, as far as a CPU can prove it: equal gradients, and no waiting for the device."""

import math
from inspect import signature
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from modeling.loss_rela import _bce_dice, _enlarge
from modeling.modeling_mdetr import MdetrModel
from modeling.modeling_rela import RelaModel
from modeling.pixel_decoder_rela import DeformableLayer
from modeling.processing_vlt import VltProcessor
from modeling.swin_rela import GatherPatches, GatherSlots, SwinBlock, partition
from modeling.vision_rela import VisionEncoder
from tests import tiny_mdetr
from tests.tiny_rela import BETTER_LOSS, INSTANCES, RESNET, SWIN, expression_rows, tiny_config, tiny_processor
from tests.tiny_training import tiny, train_here


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (3, 5)])
def test_window_gathers_have_the_gradients_of_index_select(shape, shift):
    windows = partition(*shape, 4, shift, torch.device("cpu"))
    patches = torch.randn(2, math.prod(shape), 3, dtype=torch.float64)
    padded = len(windows.patches) > patches.shape[1]
    assert padded == (shape != (8, 8))
    patches = (nn.functional.pad(patches, (0, 0, 0, 1)) if padded else patches).requires_grad_()
    slots = torch.randn(2, len(windows.patches), 3, dtype=torch.float64, requires_grad=True)
    for x, gathered, expected in (
        (patches, GatherPatches.apply(patches, windows.patches, windows.slots), patches[:, windows.patches]),
        (slots, GatherSlots.apply(slots, windows.slots, windows.patches), slots[:, windows.slots]),
    ):
        assert torch.equal(gathered, expected)
        weights = torch.randn_like(expected)
        first, second = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (gathered, expected))
        assert torch.allclose(first, second, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shapes", [((8, 8), (32, 32)), ((5, 7), (20, 28)), ((4, 6), (13, 22))])
def test_enlarging_by_matrix_products_is_interpolation(shapes):
    logits = torch.randn(3, 2, *shapes[0], dtype=torch.float64, requires_grad=True)
    masks = torch.zeros(3, *shapes[1])
    expected = nn.functional.interpolate(logits, shapes[1], mode="bilinear", align_corners=False)
    larger, weights = _enlarge(logits, masks), torch.randn_like(expected)
    assert torch.allclose(larger, expected, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad((x * weights).sum(), logits)[0] for x in (larger, expected)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mask_loss_is_cross_entropy_and_dice(scale, dtype):
    logits = (scale * torch.randn(3, 2, 8, 8, dtype=dtype)).requires_grad_()
    masks = (torch.rand(3, 8, 8) > 0.5).to(dtype)
    loss = _bce_dice(logits, masks)
    margin, truth = (logits[:, 1] - logits[:, 0]).flatten(1), masks.flatten(1)
    covered = margin.sigmoid()
    dice = 1 - (2 * (covered * truth).sum(1) + 1) / (covered.sum(1) + truth.sum(1) + 1)
    expected = nn.functional.binary_cross_entropy_with_logits(margin, truth) + dice.mean()
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(loss, expected, **tolerance)
    assert torch.allclose(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)), **tolerance)


def graph_names(node: object, names: set[str]) -> set[str]:
    """The names of all nodes of a backward graph."""
    if node is not None and node not in names:
        names.add(type(node).__name__)
        for following, _ in node.next_functions:
            graph_names(following, names)
    return names


def test_nothing_is_written_into_a_view():
    layer = DeformableLayer(tiny_config(**SWIN))
    x = torch.randn(2, 21, 32, requires_grad=True)
    names = graph_names(layer(x, torch.randn(21, 32), [(1, 1), (2, 2), (4, 4)]).grad_fn, set())
    assert "ReluBackward0" in names and not names & {"CopySlices", "AsStridedBackward0"}


class BlockingUploads(TorchFunctionMode):
    """Collects the calls that make a tensor of Python numbers on a device and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = getattr(function, "__name__", "")
        if name == "new_tensor" or (name == "tensor" and (kwargs or {}).get("device") is not None):
            self.calls.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [SWIN, {**SWIN, **INSTANCES, **BETTER_LOSS, "language_gate": "none"}])
def test_a_step_uploads_no_numbers_by_blocking_copies(changes):
    model = RelaModel(tiny_config(**changes)).train()
    batch = tiny_processor().collator(model.config, training=True)(expression_rows())
    with BlockingUploads() as uploads:
        torch.tensor([1], device="cpu")
        model(**batch).loss.backward()
    assert uploads.calls == ["tensor"], "only the one of this test"


class Copies(TorchDispatchMode):
    """Counts operations that wait for the device: masks as indices, and single numbers."""

    number = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = str(function)
        masked = name == "aten.index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.number += masked or name in ("aten.nonzero.default", "aten._local_scalar_dense.default")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["swin", "mdetr"])
def test_a_step_does_not_wait_for_the_device_but_to_match(kind):
    """Of MDETR's matching the copies of costs and counts remain, which a dispatch mode on a CPU does not count."""
    model, processor = RelaModel(tiny_config(**SWIN)), tiny_processor()
    if kind == "mdetr":
        model, processor = MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor()
    rows = [{**row, "raw": row["sentence"]} for row in expression_rows()]
    batch = processor.collator(model.config, training=True)(rows)
    assert not batch["attention_mask"].all(), "some tokens are padding"
    model.train()
    with Copies() as waits:
        model(**batch).loss.backward()
    assert waits.number == 0


@pytest.mark.slow
def test_a_step_of_train_py_leaves_a_training_model_alone(scenes_dataset, tmp_path):
    """`train()` reads whether gates are closed."""
    calls, original = [], VisionEncoder.check_gates
    with mock.patch.object(VisionEncoder, "check_gates", lambda self: calls.append(0) or original(self)):
        assert train_here(*tiny(scenes_dataset, tmp_path / "out", max_train_steps=3, category_warmup_steps=0)) == 0
        first = len(calls)
        calls.clear()
        assert train_here(*tiny(scenes_dataset, tmp_path / "more", max_train_steps=6, category_warmup_steps=0)) == 0
    assert first == len(calls) > 0


class Makers(TorchFunctionMode):
    """The names of the functions with which windows and positions are made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = getattr(function, "__name__", "")
        self.names |= {name} & {"roll", "meshgrid", "sin", "cos"}
        return function(*args, **(kwargs or {}))


def test_windows_and_positions_are_made_once_and_serve_training_after_inference():
    processor, model = tiny_processor(size={"height": 60, "width": 52}), RelaModel(tiny_config(**SWIN)).train()
    batch = processor.collator(model.config, training=True)(expression_rows())
    with torch.inference_mode(), Makers() as first:
        model(**batch)
    with Makers() as second:
        model(**batch).loss.backward()
    assert first.names == {"roll", "meshgrid", "sin", "cos"} and second.names == set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(partition(8, 8, 4, 2, torch.device("cpu")).patches, FakeTensor)
    assert not isinstance(partition(8, 8, 4, 2, torch.device("cpu")).patches, FakeTensor)


@pytest.mark.parametrize("kept", [[1, 0, 1], [0, 0, 0], [1, 1, 1]])
def test_dropped_images_are_not_computed_and_nothing_else_changes(kept):
    config = tiny_config(**{**SWIN, "drop_path_rate": 0.4})
    block = SwinBlock(config, 16, 2, 0.4).double().train()
    x, windows = torch.randn(3, 8, 8, 16, dtype=torch.float64), partition(8, 8, 4, 2, torch.device("cpu"))
    keep, sizes = torch.tensor(kept, dtype=torch.float64).view(-1, 1, 1, 1) / 0.6, []
    with mock.patch.object(SwinBlock, "kept_samples", lambda *arguments: torch.tensor(kept).float()):
        hook = block.norm1.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        actual = block(x, windows)
        hook.remove()
    assert sizes == [sum(kept) or 3]
    expected = x + keep * block.attn(block.norm1(x), windows)
    expected = expected + keep * block.mlp(block.norm2(expected))
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)  # kept samples are counted in fp32
    weights, parameters = torch.randn_like(x), list(block.parameters())
    first, second = (torch.autograd.grad((y * weights).sum(), parameters) for y in (actual, expected))
    for gradients in zip(first, second, strict=True):
        assert torch.allclose(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["rela", "mdetr"])
def test_uint8_pixels_are_normalised_on_the_device_as_by_the_processor(kind):
    processor = tiny_mdetr.tiny_processor() if kind == "mdetr" else tiny_processor()
    rows = [{**row, "raw": row["sentence"]} for row in expression_rows()]
    rows[0] = {**rows[0], "image_id": 7, "image": rows[0]["image"].resize((50, 40))}  # with padding for MDETR
    small, full = processor.collator(uint8_pixels=True)(rows), processor.collator()(rows)
    assert small["pixel_values"].nbytes * 4 == full["pixel_values"].nbytes
    normalized = processor.normalize(small)
    assert torch.equal(normalized["pixel_values"], full["pixel_values"])
    assert normalized.keys() == full.keys() and processor.normalize(full) is full


def test_pixels_that_no_integer_holds_stay_normalised():
    letterbox = tiny_processor(size={"longest_edge": 64}).collator(uint8_pixels=True)
    assert letterbox(expression_rows())["pixel_values"].dtype == torch.float32
    arrays = [{**row, "image": np.asarray(row["image"]) / np.float32(255)} for row in expression_rows()]
    batch = tiny_processor().collator(uint8_pixels=True)(arrays)
    assert torch.equal(batch["pixel_values"], tiny_processor().collator()(expression_rows())["pixel_values"])
    assert "uint8_pixels" in signature(VltProcessor.collator).parameters


def test_every_trained_parameter_has_a_gradient():
    """So that DistributedDataParallel need not look for those without."""
    rows = [{**row, "raw": row["sentence"]} for row in expression_rows()]
    changes = [SWIN, {**SWIN, "language_gate": "open", "drop_path_rate": 0.9}, {**INSTANCES, **BETTER_LOSS}, RESNET]
    models = [(RelaModel(tiny_config(**change)), tiny_processor()) for change in changes]
    for model, processor in [*models, (MdetrModel(tiny_mdetr.tiny_config()), tiny_mdetr.tiny_processor())]:
        model.train()(**processor.collator(model.config, training=True)(rows)).loss.backward()
        assert not [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]


@pytest.mark.parametrize(("warm_up", "supervised", "expected"), [(0, True, False), (2, True, True), (0, False, False)])
def test_parameters_without_gradient_are_looked_for_where_there_are_any(
    scenes_dataset, tmp_path, warm_up, supervised, expected
):
    flags = {"category_warmup_steps": warm_up, "category_supervision": supervised}
    AcceleratorState._reset_state(reset_partial_state=True)
    run = train.Run(train.parse_config(tiny(scenes_dataset, tmp_path / "out", **flags)))
    assert run.accelerator.ddp_handler.find_unused_parameters == expected


def test_answers_come_from_the_device_once_for_a_batch():
    processor, model = tiny_processor(), RelaModel(tiny_config(**INSTANCES)).eval()
    numbers, lists, original = [], [], torch.Tensor.tolist

    def tolist(x: torch.Tensor) -> list:
        lists.append(x)
        return original(x)

    for copies in (1, 5):
        batch = processor.collator()(expression_rows() * copies)
        batch.pop("labels")
        with torch.no_grad():
            outputs = model(**batch)
        sizes = torch.tensor([[64, 64]] * 4 * copies)
        lists.clear()
        with mock.patch.object(torch.Tensor, "tolist", tolist), Copies() as waits:
            processor.post_process_referring_detection(outputs, threshold=0.0, target_sizes=sizes)
        numbers.append((len(lists), waits.number))
    assert numbers[0] == numbers[1] == (3, 0)


@pytest.mark.parametrize(("precision", "expected"), [("no", "highest"), ("bf16", "high")])
def test_mixed_precision_lets_fp32_products_use_tf32(scenes_dataset, tmp_path, precision, expected):
    torch.set_float32_matmul_precision("highest")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train.Run(train.parse_config(tiny(scenes_dataset, tmp_path / "out", mixed_precision=precision)))
        assert torch.get_float32_matmul_precision() == expected
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_float32_matmul_precision("highest")


def test_answers_are_not_computed_where_nothing_reads_them():
    model = RelaModel(tiny_config(**INSTANCES))
    batch = tiny_processor().collator(model.config, training=True)(expression_rows())
    assert model.train()(**batch).pred_masks is None
    measured = model.eval()(**batch)
    assert measured.loss is not None and measured.pred_masks is not None and measured.pred_boxes is not None
