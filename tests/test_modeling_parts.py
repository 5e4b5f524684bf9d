"""The parts of ReLA on their own: deformable attention, windows, fusion, positions, losses, configuration."""

import pytest
import torch
from torch import nn

from modeling.configuration_rela import RelaConfig
from modeling.fusion_rela import LanguageFusion, gather_words, normalize_pixels
from modeling.loss_rela import category_loss, referring_loss
from modeling.pixel_decoder_rela import DeformableAttention, gather_points, sine_positions
from modeling.region_decoder_rela import RegionLanguage, RegionOutput
from modeling.swin_rela import relative_position_index, shift_mask
from tests.tiny_rela import BETTER_LOSS, tiny_config

SHAPES = [(3, 4), (6, 8), (12, 15)]


def sampled_by_grid(
    values: torch.Tensor, shapes: list[tuple[int, int]], places: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`gather_points` by torch's own bilinear sampling, level by level."""
    total = 0
    for i, part in enumerate(values.split([h * w for h, w in shapes], dim=1)):
        height, width = shapes[i]
        maps = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))  # (batch * heads, channels, h, w)
        grid = (places[:, :, :, i] + 0.5) / torch.tensor([width, height]) * 2 - 1
        grid = grid.transpose(1, 2).flatten(0, 1)  # (batch * heads, queries, points, 2)
        samples = nn.functional.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
        samples = samples.unflatten(0, values.shape[::2][:2])  # (batch, heads, channels, queries, points)
        total = total + (samples * weights[:, :, :, i].transpose(1, 2)[:, :, None]).sum(-1)
    return total.permute(0, 3, 1, 2)


def test_gathered_points_equal_bilinear_sampling_with_gradients() -> None:
    torch.manual_seed(0)
    pixels = sum(h * w for h, w in SHAPES)
    values = torch.randn(2, pixels, 4, 5, dtype=torch.float64, requires_grad=True)
    places = torch.rand(2, 7, 4, 3, 2, 2, dtype=torch.float64) * 20 - 3  # many outside, on every side
    places.requires_grad_()
    weights = torch.rand(2, 7, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    ours, theirs = gather_points(values, SHAPES, places, weights), sampled_by_grid(values, SHAPES, places, weights)
    torch.testing.assert_close(ours, theirs)
    probe = torch.randn_like(ours)
    inputs = (values, places, weights)
    for mine, other in zip(torch.autograd.grad(ours, inputs, probe), torch.autograd.grad(theirs, inputs, probe)):
        torch.testing.assert_close(mine, other)


def test_deformable_attention_starts_by_looking_around_each_pixel() -> None:
    attention = DeformableAttention(16, heads=4, levels=3, points=2)
    attention.reset()
    steps = attention.offsets.bias.view(4, 3, 2, 2)
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in (0, 1):
            expected = torch.tensor(direction, dtype=torch.float) * (point + 1)
            torch.testing.assert_close(steps[head, :, point], expected.expand(3, 2), atol=1e-6, rtol=0)


def test_windows_separate_what_the_shift_brought_together() -> None:
    mask = shift_mask(8, 4, 4, torch.device("cpu"))
    assert mask.shape == (2, 16, 16)
    assert (mask == mask.transpose(1, 2)).all()
    assert mask[0].view(4, 4, 4, 4)[0, 0, 3, 1] == 0, "upper window: rows belong together"
    assert mask[1].view(4, 4, 4, 4)[1, 0, 2, 0] == -100, "lower window: its last rows came from the top"
    index = relative_position_index(3)
    assert index.unique().tolist() == list(range(25))
    assert (index.diagonal() == 12).all()


def test_fusion_ignores_padding_and_the_order_of_images() -> None:
    torch.manual_seed(0)
    fusion = LanguageFusion(8, 6)
    pixels, text = torch.randn(2, 5, 4, 8), torch.randn(3, 7, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 3)
    index = torch.tensor([0, 1, 1])
    fused = fusion(pixels, text, mask, index)
    torch.testing.assert_close(fusion(pixels, text + (1 - mask)[..., None] * 9.0, mask, index), fused)
    torch.testing.assert_close(fusion(pixels.flip(0), text, mask, 1 - index), fused)
    plain = nn.functional.instance_norm(pixels.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(normalize_pixels(pixels.flatten(1, 2)), plain)


def test_words_are_gathered_by_attention_and_instance_normalised() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 40, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8) + 3
    words = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])[..., None]

    def plain(scale: float) -> torch.Tensor:
        logits = (scale * query.double()) @ key.double().transpose(1, 2) / 8**0.5
        gathered = logits.masked_fill(words.transpose(1, 2) == 0, -torch.inf).softmax(-1) @ value.double()
        return nn.functional.instance_norm(gathered.transpose(1, 2)).transpose(1, 2)

    for scale, tolerance in ((1.0, 1e-5), (1e-2, 3e-4)):  # the second: pixels that nearly agree on their words
        gathered = gather_words(scale * query, key, value, words)
        torch.testing.assert_close(gathered.double(), plain(scale), atol=tolerance, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_reaches_the_regions_as_published_unless_masked(masked: bool) -> None:
    torch.manual_seed(0)
    language = RegionLanguage(tiny_config(region_language_mask=masked))
    query, text, mask = torch.randn(2, 16, 32), torch.randn(2, 5, 32), torch.tensor([[1, 1, 0, 0, 0]] * 2)
    other = text + 3 * (1 - mask)[..., None]
    assert torch.allclose(language(query, other, mask), language(query, text, mask)) == masked


def test_sine_positions_tell_every_pixel_apart() -> None:
    positions = sine_positions(5, 7, 16, torch.device("cpu"))
    assert positions.shape == (35, 16)
    distances = torch.cdist(positions, positions) + 9 * torch.eye(35)
    assert distances.min() > 0.1
    grid = positions.view(5, 7, 16)
    assert (grid[..., :8].diff(dim=1) == 0).all() and (grid[..., 8:].diff(dim=0) == 0).all()


def prediction(masks: torch.Tensor, no_target: torch.Tensor, sure: float) -> RegionOutput:
    """Logits +-`sure` that say exactly what the labels say, on 16 regions."""
    small = nn.functional.interpolate(masks[:, None].float(), (4, 4), mode="area").flatten(1)
    both = [torch.stack([-x, x], dim) * sure for x, dim in ((2 * masks - 1, 1), (2 * small - 1, 2))]
    verdicts = torch.stack([~no_target, no_target], 1) * 2 * sure - sure
    return RegionOutput(*both, verdicts, regions=torch.zeros(len(masks), 16, 1))


@pytest.mark.parametrize("changes", [{}, BETTER_LOSS], ids=["published", "better"])
def test_loss_is_zero_when_right_and_grows_when_wrong(changes: dict) -> None:
    masks = torch.zeros(2, 16, 16)
    masks[0, 4:12, :8] = 1
    no_target = torch.tensor([False, True])
    config = tiny_config(**changes)
    loss, terms = referring_loss([prediction(masks, no_target, 30.0)], masks, no_target, config)
    assert loss < 1e-3 and set(terms) == {"mask", "minimap", "no_target"}
    wrong, _ = referring_loss([prediction(1 - masks, ~no_target, 1.0)], masks, no_target, config)
    unsure, _ = referring_loss([prediction(masks, no_target, 0.0)], masks, no_target, config)
    assert wrong > unsure > 0.5
    twice, _ = referring_loss([prediction(masks, no_target, 0.0)] * 2, masks, no_target, config)
    torch.testing.assert_close(twice, 2 * unsure)


def test_minimap_target_is_the_centre_as_published_or_the_covered_fraction() -> None:
    masks = torch.zeros(1, 16, 16)
    masks[0, :4, :6] = 1  # one whole cell of 4 x 4 and half of the next
    no_target = torch.tensor([False])
    for soft, cell in ((False, 0.0), (True, 0.5)):
        config = tiny_config(soft_minimap=soft, class_weights=[1.0, 1.0])
        minimap = torch.zeros(1, 16, 2, requires_grad=True)
        flat = RegionOutput(torch.zeros(1, 2, 4, 4), minimap, torch.zeros(1, 2), regions=torch.zeros(1, 16, 1))
        _, terms = referring_loss([flat], masks, no_target, config)
        terms["minimap"].backward()
        target = 0.5 - 16 * minimap.grad[0, :, 1]  # the gradient of cross entropy is (0.5 - target) / cells
        assert target[0] == pytest.approx(1.0)
        assert target[1] == pytest.approx(cell)
        assert target[2:].abs().max() == pytest.approx(0.0)


def test_category_loss_leaves_out_what_is_to_be_ignored() -> None:
    logits = torch.randn(1, 3, 4, 4)
    categories = torch.full((1, 16, 16), -100)
    assert category_loss(logits, categories) == 0
    categories[0, :4, :4] = 2
    torch.testing.assert_close(category_loss(logits, categories), -logits.log_softmax(1)[0, 2, 0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 50}, "not a square"),
        ({"backbone": "vgg"}, "swin, resnet, conv"),
        ({"hidden_size": 30}, "num_attention_heads"),
        ({"pixel_decoder_size": 24, "norm_groups": 16}, "norm_groups"),
        ({"num_categories": 3, "language_gate": "open"}, "language-free"),
    ],
)
def test_contradicting_fields_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RelaConfig(**changes)
    assert str(next(iter(changes.values()))) in str(caught.value)
