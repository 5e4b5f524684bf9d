"""RelaModel as a transformers citizen: attention, precision, compilation, export, checkpointing, saving."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from modeling.configuration_rela import RelaConfig
from modeling.image_processing_rela import RelaImageProcessor
from modeling.modeling_rela import RelaModel
from modeling.processing_rela import RelaCollator, RelaProcessor
from tests.fresh_process import outputs_elsewhere
from tests.tiny_rela import RESNET, SWIN, expression_rows, tiny_config, tiny_processor

BACKBONES = pytest.mark.parametrize("changes", [{}, SWIN, RESNET], ids=["conv", "swin", "resnet"])


@pytest.fixture(scope="module")
def batch() -> dict:
    return RelaCollator(tiny_processor())(expression_rows())


@pytest.fixture(scope="module")
def inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name != "labels"}


def tiny_model(seed: int = 0, **changes: object) -> RelaModel:
    torch.manual_seed(seed)
    return RelaModel(tiny_config(**changes)).eval()


@BACKBONES
def test_eager_attention_equals_sdpa(inputs: dict, changes: dict) -> None:
    model = tiny_model(**changes)
    assert model.config._attn_implementation == "sdpa"
    expected = model(**inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).pred_masks, expected.pred_masks, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SWIN, RESNET], ids=["swin", "resnet"])
def test_compiles_without_graph_breaks(inputs: dict, batch: dict, changes: dict) -> None:
    model = tiny_model(**changes)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for some in (one_to_one(inputs), batch):
        found, expected = compiled(**some), model(**some)
        torch.testing.assert_close(found.pred_masks, expected.pred_masks, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss)


def one_to_one(inputs: dict) -> dict:
    """The same sentences, each with an image of its own."""
    paired = {**inputs, "pixel_values": inputs["pixel_values"][inputs["image_index"]]}
    return {name: value for name, value in paired.items() if name != "image_index"}


@pytest.mark.slow
@BACKBONES
def test_exports(inputs: dict, changes: dict) -> None:
    model = tiny_model(**changes)
    sentences = {name: {0: torch.export.Dim("sentences", max=64)} for name in inputs if name != "pixel_values"}
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes={"pixel_values": None, **sentences}).module()
        torch.testing.assert_close(exported(**inputs).pred_masks, model(**inputs).pred_masks)
        fewer = {name: value if name == "pixel_values" else value[:3] for name, value in inputs.items()}
        torch.testing.assert_close(exported(**fewer).pred_masks, model(**fewer).pred_masks, atol=1e-5, rtol=1e-4)


@BACKBONES
def test_gradient_checkpointing_changes_no_gradient(batch: dict, changes: dict) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(**changes).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.02)])
@BACKBONES
def test_half_precision_keeps_the_fragile_parts_in_fp32(
    inputs: dict, changes: dict, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    model = tiny_model(**changes)
    # Not a flat picture: where all pixels agree, instance normalisation magnifies whatever the rounding left.
    inputs = {**inputs, "pixel_values": torch.randn(2, 3, 128, 128)}
    model.save_pretrained(tmp_path)
    half = RelaModel.from_pretrained(tmp_path, dtype=dtype)
    assert next(half.vision_encoder.parameters()).dtype == dtype
    assert half.region_decoder.layers[0].fc1.weight.dtype == dtype
    for part in (half.text_encoder, half.pixel_decoder, half.region_decoder.heads):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    with torch.no_grad():
        exact, rounded = model(**inputs).pred_masks, half(**inputs).pred_masks
        with torch.autocast("cpu", dtype=dtype):
            automatic = model(**inputs).pred_masks
        everything = model.to(dtype)(**inputs).pred_masks
    assert (rounded - exact).norm() < tolerance * exact.norm()
    assert (automatic - exact).norm() < tolerance * exact.norm()
    assert everything.isfinite().all()


@pytest.mark.slow
@BACKBONES
def test_saved_model_gives_identical_outputs_in_a_fresh_process_elsewhere(
    inputs: dict, changes: dict, tmp_path: Path
) -> None:
    model, folder = tiny_model(**changes), tmp_path / "saved"
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    with torch.no_grad():
        expected = model(**inputs)
    for name, value in outputs_elsewhere(folder, inputs, tmp_path).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_closed_gates_run_the_trunk_once_per_image(inputs: dict) -> None:
    model = tiny_model(**SWIN)
    assert model.vision_encoder.gates_closed
    shared = model(**inputs)
    model.vision_encoder.gates_closed = False  # the general path, with gates that add zero
    torch.testing.assert_close(model(**inputs).pred_masks, shared.pred_masks, atol=1e-5, rtol=1e-4)
    seen = []
    model.vision_encoder.trunk.layers[3].register_forward_hook(lambda module, args, x: seen.append(len(x)))
    model(**inputs)
    model.eval()(**inputs)
    assert seen == [4, 2], "four sentences about two images"


def test_gates_that_open_are_noticed_and_learn(batch: dict) -> None:
    model = tiny_model(**SWIN)
    assert not any(parameter.requires_grad for parameter in model.vision_encoder.gates.parameters())
    weights = model.state_dict()
    weights["vision_encoder.gates.2.inner.weight"] = torch.ones_like(weights["vision_encoder.gates.2.inner.weight"])
    model.load_state_dict(weights)
    assert not model.vision_encoder.gates_closed
    model(**batch).loss.backward()
    assert model.vision_encoder.gates[2].outer.weight.grad.abs().sum() > 0
    opened = tiny_model(**{**SWIN, "language_gate": "open"})
    opened(**batch).loss.backward()
    assert all(gate.outer.weight.grad.abs().sum() > 0 for gate in opened.vision_encoder.gates)


def sharded_step(rank: int, meeting: str, batch: dict, losses: dict) -> None:
    """One process of two: shard the model, look at the gates again, take the loss and its gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for language_gate in ("published", "open"):
        model = tiny_model(**{**SWIN, "language_gate": language_gate})
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        loss = model.train().eval()(**batch).loss
        loss.backward()
        losses[rank, language_gate] = loss.item()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_shards_over_two_processes(batch: dict, tmp_path: Path) -> None:
    with torch.multiprocessing.Manager() as manager:
        losses = manager.dict()
        arguments = (str(tmp_path / "meeting"), batch, losses)
        start_processes(sharded_step, arguments, nprocs=2, start_method="forkserver")
        assert len(losses) == 4
        for (_, language_gate), loss in losses.items():
            expected = tiny_model(**{**SWIN, "language_gate": language_gate})(**batch).loss.item()
            assert loss == pytest.approx(expected, rel=1e-5)


def test_auto_classes_know_the_model_without_remote_code(inputs: dict, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is RelaConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is RelaProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is RelaImageProcessor
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is RelaModel
    torch.testing.assert_close(loaded(**inputs).pred_masks, model(**inputs).pred_masks)


def test_pickles(inputs: dict) -> None:
    model = tiny_model(**SWIN)
    copy = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copy(**inputs).pred_masks, model(**inputs).pred_masks)


def test_tuples_and_dictionaries_of_outputs_agree(inputs: dict) -> None:
    model = tiny_model()
    output = model(**inputs)
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], output.pred_masks)


def test_large_maps_are_decoded_one_by_one_alike(inputs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**SWIN)
    together = model(**inputs).pred_masks
    monkeypatch.setattr("modeling.fusion_rela.LARGE_MAP", 1)
    torch.testing.assert_close(model(**inputs).pred_masks, together, atol=1e-5, rtol=1e-4)
