"""Hidden states of images and convolutions as `[example, position, feature]`, whatever axis holds the features.

The axes of each architecture are listed by hand; values are computed in float64 from the outputs of its blocks,
pixel by pixel.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    DataError,
    DistillationTrainer,
    Distiller,
    HiddenMatch,
    RelationMatch,
    SettingError,
    SimilarityMatch,
    TeacherCache,
)
from hf_distill.models.blocks import Features, as_positions
from hf_distill.models.capture import ActivationCapture
from hf_distill.objectives import ExitMatch
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN, ActivationKey
from hf_distill.teachers.cache import BuildOptions
from tests.trainer.tiny import arguments

FIRST, LAST, TOKENS = "b c h w", "b h w c", "b t d"
_STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
_WINDOWED = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1]}
_SEGFORMER = {
    "num_encoder_blocks": 2, "num_attention_heads": [1, 1], "sr_ratios": [2, 1], "patch_sizes": [7, 3],
    "strides": [4, 2], "mlp_ratios": [1, 1], "decoder_hidden_size": 8, **_STAGES,
}  # fmt: skip

# Architecture → class, config, path of the blocks, axes of their output, and their widths.
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any], str, str, list[int]]] = {
    "convnext": (
        hf.ConvNextForImageClassification, {"num_stages": 2, "patch_size": 4, **_STAGES},
        "convnext.encoder.stages", FIRST, [8, 16],
    ),
    "convnextv2": (
        hf.ConvNextV2ForImageClassification, {"num_stages": 2, "patch_size": 4, **_STAGES},
        "convnextv2.encoder.stages", FIRST, [8, 16],
    ),
    "dinov3_convnext": (hf.DINOv3ConvNextModel, {"image_size": 32, **_STAGES}, "model.stages", FIRST, [8, 16]),
    "resnet": (
        hf.ResNetForImageClassification, {"embedding_size": 8, "layer_type": "basic", **_STAGES},
        "resnet.encoder.stages", FIRST, [8, 16],
    ),
    "regnet": (
        hf.RegNetForImageClassification, {"embedding_size": 8, "groups_width": 4, **_STAGES},
        "regnet.encoder.stages", FIRST, [8, 16],
    ),
    "bit": (
        hf.BitForImageClassification, {"embedding_size": 8, "num_groups": 2, **_STAGES},
        "bit.encoder.stages", FIRST, [8, 16],
    ),
    "swiftformer": (
        hf.SwiftFormerForImageClassification, {"embed_dims": [8, 16], "depths": [1, 1], "image_size": 32},
        "swiftformer.encoder.network", FIRST, [8, 16, 16],
    ),
    "segformer": (hf.SegformerForImageClassification, _SEGFORMER, "segformer.stages", FIRST, [8, 16]),
    "cvt": (
        hf.CvtForImageClassification,
        {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "drop_rate": [0.0] * 3},
        "cvt.encoder.stages", FIRST, [8, 16, 16],
    ),
    "vitdet": (hf.VitDetModel, {**_VIT, "pretrain_image_size": 32, "mlp_ratio": 1}, "encoder.layer", FIRST, [16, 16]),
    "sam": (
        hf.SamVisionModel, {**_VIT, "window_size": 4, "global_attn_indexes": [1], "output_channels": 8, "mlp_dim": 16},
        "vision_encoder.layers", LAST, [16, 16],
    ),
    "swin": (
        hf.SwinForImageClassification, {**_WINDOWED, "num_heads": [1, 2], "window_size": 4},
        "swin.encoder.layers", TOKENS, [16, 16],
    ),
    "focalnet": (
        hf.FocalNetForImageClassification,
        {**_WINDOWED, "hidden_sizes": [8, 16], "focal_levels": [1, 1], "focal_windows": [3, 3]},
        "focalnet.encoder.stages", TOKENS, [16, 16],
    ),
    "pvt_v2": (
        hf.PvtV2ForImageClassification,
        {
            "image_size": 32, "num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2],
            "num_attention_heads": [1, 2], "mlp_ratios": [1, 1], **_STAGES,
        },
        "pvt_v2.encoder.layers", TOKENS, [8, 16],
    ),
    "vit": (hf.ViTForImageClassification, {**_VIT, "intermediate_size": 16}, "vit.layers", TOKENS, [16, 16]),
}  # fmt: skip


def made(name: str, seed: int, **settings: Any) -> Any:
    model_class, shape, *_ = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**{**shape, **settings})).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def model_of(name: str, seed: int = 1) -> Any:
    """Return a shared model, which no test may change."""
    return made(name, seed)


def image(size: int = 32, count: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))}


def block_outputs(model: Any, path: str, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the unchanged outputs of the blocks in float64."""
    found: list[Tensor] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        while not isinstance(output, Tensor):
            output = output[0]
        found.append(output.detach().double())

    hooks = [block.register_forward_hook(note) for block in model.get_submodule(path)]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def pixels(x: Tensor, axes: str) -> Tensor:
    """Return `[b t d]`, pixel by pixel."""
    if axes == TOKENS:
        return x
    height, width = (x.shape[2], x.shape[3]) if axes == FIRST else (x.shape[1], x.shape[2])
    each = [x[:, :, i, j] if axes == FIRST else x[:, i, j] for i in range(height) for j in range(width)]
    return torch.stack(each, 1)


def read(model: Any, reads: set[ActivationKey], batch: dict[str, Tensor]) -> Any:
    with torch.no_grad(), ActivationCapture(model, "student").capture(reads) as seen:
        model(**batch)
    return seen


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_pixel_is_a_position(name: str, size: int) -> None:
    """At 32 px ConvNeXt's first stage is `[2, 8, 8, 8]`: the shape of one forward is ambiguous."""
    if size == 64 and name in ("sam", "vit", "swin", "pvt_v2"):
        return  # only one image size, or built for this one
    _, _, path, axes, widths = ARCHITECTURES[name]
    model, batch = model_of(name), image(size)
    reads = {ActivationKey(HIDDEN, layer, None, path) for layer in range(len(widths))}
    seen = read(model, reads, batch)
    for layer, (raw, width) in enumerate(zip(block_outputs(model, path, batch), widths, strict=True)):
        found = seen[ActivationKey(HIDDEN, layer, None, path)]
        assert found.shape[-1] == width and found.dim() == 3
        torch.testing.assert_close(found.double(), pixels(raw, axes), atol=0, rtol=0)


def test_an_ambiguous_shape_is_resolved_with_another_input_size() -> None:
    """The first stage of ConvNeXt, at 32 px."""
    raw = block_outputs(model_of("convnext"), "convnext.encoder.stages", image(32))[0]
    assert raw.shape == (2, 8, 8, 8)
    assert not torch.equal(pixels(raw, FIRST), pixels(raw, LAST))


def test_axes_are_found_without_running_the_users_model() -> None:
    """A copy on torch's meta device runs: no user hook is called, no weight touched, no random number drawn."""
    model, calls = made("resnet", 1).train(), []
    model.resnet.register_forward_hook(lambda *_: calls.append(1))
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    blocks = ActivationCapture(model, "student").blocks(None, "resnet.encoder.stages")
    assert blocks.features[HIDDEN, 1] == Features(1, 16) and blocks.features[LAST_HIDDEN, 0] == Features(1, 16)
    assert not calls and model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def stacks(name: str) -> dict[str, str]:
    return {"student_stack": ARCHITECTURES[name][2], "teacher_stack": ARCHITECTURES[name][2]}


def term(student: Any, teacher: Any, objective: Any, batch: dict[str, Tensor]) -> float:
    return Distiller(student, teacher, objectives=objective, alpha=None, task="classification", seed=0)(
        student, batch
    ).loss.item()


def distance_by_hand(distance: str, s: Tensor, t: Tensor) -> float:
    """Return the mean over examples of the mean over positions, from `[b t d]`, position by position."""
    each = []
    for example, position in itertools.product(range(s.shape[0]), range(s.shape[1])):
        a, b = s[example, position], t[example, position]
        if distance == "cosine":
            each.append(1 - (a @ b) / (a.norm() * b.norm()))
        else:
            each.append((a - b).square().mean())
    return torch.stack(each).mean().item()


@pytest.mark.parametrize("distance", ["mean_squared", "cosine"])
@pytest.mark.parametrize("name", ["convnext", "resnet", "segformer", "vitdet", "sam", "swin", "pvt_v2"])
def test_hidden_states_are_compared_pixel_by_pixel(name: str, distance: str) -> None:
    """Once ConvNeXt gave four times the mean square, eight times at twice the size, and cosines over image rows."""
    _, _, path, axes, widths = ARCHITECTURES[name]
    student, teacher, last = model_of(name), model_of(name, 2), len(widths) - 1
    for size in (32, 64) if name in ("convnext", "resnet") else (32,):
        batch = image(size)
        s, t = (pixels(block_outputs(model, path, batch)[last], axes) for model in (student, teacher))
        found = term(student, teacher, HiddenMatch([(last, last)], distance=distance, **stacks(name)), batch)
        assert found == pytest.approx(distance_by_hand(distance, s, t), rel=1e-5)


def test_hidden_states_of_automatically_found_blocks() -> None:
    """VitDet's blocks are found without a stack name, and compute on `[b c h w]`."""
    student, teacher, batch = model_of("vitdet"), model_of("vitdet", 2), image()
    s, t = (pixels(block_outputs(model, "encoder.layer", batch)[1], FIRST) for model in (student, teacher))
    distiller = Distiller(student, teacher, objectives=HiddenMatch([(1, 1)]), alpha=None, task="classification")
    assert distiller(student, batch).loss.item() == pytest.approx(distance_by_hand("mean_squared", s, t), rel=1e-5)


def test_the_input_of_the_first_block_and_the_last_hidden_state() -> None:
    path = "convnext.encoder.stages"
    model, batch = model_of("convnext"), image()
    seen = read(
        model, {ActivationKey(HIDDEN, EMBEDDINGS, None, path), ActivationKey(LAST_HIDDEN, 0, None, path)}, batch
    )
    with torch.no_grad():
        embedded = model.convnext.embeddings(batch["pixel_values"])
        last = model.convnext(**batch).last_hidden_state
    assert torch.equal(seen[ActivationKey(HIDDEN, EMBEDDINGS, None, path)], pixels(embedded, FIRST))
    assert torch.equal(seen[ActivationKey(LAST_HIDDEN, 0, None, path)], pixels(last, FIRST))
    student, teacher = model_of("convnext"), model_of("convnext", 2)
    with torch.no_grad():
        s, t = (pixels(one.convnext(**batch).last_hidden_state.double(), FIRST) for one in (student, teacher))
    assert term(student, teacher, CosineEmbedding(**stacks("convnext")), batch) == pytest.approx(
        distance_by_hand("cosine", s, t)
    )


@pytest.mark.parametrize("name", ["convnext", "segformer"])
def test_projections_have_the_widths_of_each_stage(name: str) -> None:
    """Each stage has its own widths, 8 → 12 and 16 → 24; the test sets the matrices."""
    wider = made(name, 2, hidden_sizes=[12, 24])
    student, batch, path = model_of(name), image(), ARCHITECTURES[name][2]
    objective = HiddenMatch("even", embeddings=name == "convnext", **stacks(name))
    distiller = Distiller(student, wider, objectives=objective, alpha=None, seed=0)
    matrices = distiller.objectives["hidden"].learned.matrices
    shapes = {key: tuple(matrix.weight.shape) for key, matrix in matrices.items()}
    assert shapes == {"0_0": (12, 8), "1_1": (24, 16)} | ({"embeddings": (12, 8)} if name == "convnext" else {})
    expected = 0.0
    for layer in (0, 1):
        s, t = (pixels(block_outputs(model, path, batch)[layer], FIRST) for model in (student, wider))
        projected = s @ matrices[f"{layer}_{layer}"].weight.detach().double().T
        expected += distance_by_hand("mean_squared", projected, t)
    if name == "convnext":
        with torch.no_grad():
            s, t = (pixels(m.convnext.embeddings(batch["pixel_values"]).double(), FIRST) for m in (student, wider))
        expected += distance_by_hand("mean_squared", s @ matrices["embeddings"].weight.detach().double().T, t)
    found = distiller(student, batch)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    found.loss.backward()
    assert all(matrix.weight.grad.any() for matrix in matrices.values())
    student.zero_grad()


def test_a_shared_projection_requires_equal_width_pairs() -> None:
    wider = made("convnext", 2, hidden_sizes=[12, 24])
    with pytest.raises(SettingError, match=r"projection='shared' .*\(16, 24\), \(8, 12\)"):
        term(model_of("convnext"), wider, HiddenMatch("even", projection="shared", **stacks("convnext")), image())
    with pytest.raises(SettingError, match="hidden states are 8 wide, the teacher's 12, and projection='none'"):
        term(model_of("convnext"), wider, HiddenMatch("even", projection="none", **stacks("convnext")), image())


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_similarity_pools_pixels(pooling: str) -> None:
    """Tung and Mori by hand; the maps may differ in size and width."""
    student, teacher = model_of("convnext"), made("convnext", 2, hidden_sizes=[12, 24], patch_size=8)
    batch = image(64, count=3)
    vectors = []
    for model in (student, teacher):
        x = pixels(block_outputs(model, "convnext.encoder.stages", batch)[1], FIRST)
        vectors.append(x.mean(1) if pooling == "mean" else x[:, 0] if pooling == "first" else x[:, -1])
    tables = [x @ x.T for x in vectors]
    q, p = (table / table.norm(dim=1, keepdim=True) for table in tables)
    expected = (q - p).square().sum().item() / 9
    objective = SimilarityMatch(pooling=pooling, **stacks("convnext"))
    assert term(student, teacher, objective, batch) == pytest.approx(expected, rel=1e-4)


def test_relations_between_pixels() -> None:
    """Queries of SegFormer's last stage are `[b t d]`; MiniLM's formula by hand."""
    student, teacher, batch = model_of("segformer"), model_of("segformer", 2), image()
    objective = RelationMatch([(1, 1)], relations=["queries"], relation_heads=2, **stacks("segformer"))
    found = term(student, teacher, objective, batch)
    relations = []
    for model in (student, teacher):
        queries: list[Tensor] = []
        (projection,) = [
            module for name, module in model.segformer.stages[1].named_modules() if name.endswith("q_proj")
        ]
        hook = projection.register_forward_hook(lambda m, i, out, kept=queries: kept.append(out.double()))
        with torch.no_grad():
            model(**batch)
        hook.remove()
        x = queries[0].unflatten(-1, (2, 8)).transpose(1, 2)
        relations.append(x @ x.transpose(-1, -2) / 8**0.5)
    q, p = (r.log_softmax(-1) for r in relations)
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_exits_of_stages_with_different_widths() -> None:
    """As in the paper, the features of an exit are as wide as the last stage's."""
    student, batch = made("convnext", 1), image() | {"labels": torch.tensor([0, 1])}
    objective = ExitMatch([0], feature_weight=1.0, alpha=1.0, student_stack="convnext.encoder.stages")
    distiller = Distiller(student, alpha=0.0, objectives=objective, seed=0)
    head = distiller.objectives["exits"].learned["0"]
    assert head.features.weight.shape == (16, 8)
    found = distiller(student, batch).terms["exits"].item()
    first, last = (
        pixels(x, FIRST).mean(1)
        for x in block_outputs(student, "convnext.encoder.stages", {"pixel_values": image()["pixel_values"]})
    )
    features = first @ head.features.weight.double().T + head.features.bias.double()
    exit_logits = features.tanh() @ head.classifier.weight.double().T + head.classifier.bias.double()
    with torch.no_grad():
        aim = student(**image()).logits.double()
    q, p = (exit_logits / 3).log_softmax(-1), (aim / 3).log_softmax(-1)
    expected = 9 * (p.exp() * (p - q)).sum(-1).mean() + (features - last).square().sum(-1).mean()
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("objective", [HiddenMatch, SimilarityMatch])
def test_a_cached_teacher_equals_the_live_one(objective: Callable[..., Any], tmp_path: Path) -> None:
    student, teacher = model_of("convnext"), made("convnext", 2, hidden_sizes=[12, 24])
    matched, batch = objective(layers=[(1, 1)], **stacks("convnext")), image(count=3)
    data = [{"pixel_values": one} for one in batch["pixel_values"]]
    cache = TeacherCache.build(
        teacher,
        data,
        tmp_path / "cache",
        student=student,
        objectives=matched,
        progress=False,
        options=BuildOptions(activation_dtype="float32"),
    )
    live = term(student, teacher, matched, batch)
    assert term(student, cache, matched, batch) == pytest.approx(live, rel=1e-5)


def test_training_on_feature_maps(tmp_path: Path) -> None:
    """In the trainer with micro-batches, the logged loss is the mean over the pixels of the step."""
    student, teacher = made("convnext", 1), made("convnext", 2)
    batch = image(count=4)
    data = [{"pixel_values": one, "labels": 0} for one in batch["pixel_values"]]
    s, t = (pixels(block_outputs(model, "convnext.encoder.stages", batch)[1], FIRST) for model in (student, teacher))
    args = arguments(
        tmp_path, alpha=None, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1
    )
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data,
        objectives=HiddenMatch([(1, 1)], **stacks("convnext")),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss/hidden"] == pytest.approx(
        distance_by_hand("mean_squared", s, t), rel=1e-4
    )


def test_the_convolutions_of_a_speech_model() -> None:
    """`[b c t]`, with as many frames as channels; the mask applies to the frames of the last convolutions."""
    shape = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (10, 5), "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
    }  # fmt: skip
    path, mask = "wav2vec2.feature_extractor.conv_layers", torch.ones(2, 400, dtype=torch.long)
    mask[1, 300:] = 0
    batch = {"input_values": torch.randn(2, 400), "attention_mask": mask}
    student, teacher = (hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**shape)).eval() for _ in range(2))
    raw = [block_outputs(model, path, batch)[1].transpose(1, 2) for model in (student, teacher)]
    assert raw[0].shape == (2, 8, 8)
    frames = student._get_feat_extract_output_lengths(mask.sum(1)).tolist()
    each = [(raw[0][b, t] - raw[1][b, t]).square().mean() for b in range(2) for t in range(frames[b])]
    named = {"student_stack": path, "teacher_stack": path}
    distiller = Distiller(student, teacher, objectives=HiddenMatch([(1, 1)], **named), alpha=None)
    assert distiller(student, batch).loss.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    earlier = Distiller(student, teacher, objectives=HiddenMatch([(0, 0)], **named), alpha=None)
    with pytest.raises(DataError, match=r"of block 0 of the student are at \[2, 40\]"):
        earlier(student, batch)


# Errors.


def test_feature_maps_of_different_sizes_raise() -> None:
    other = made("convnext", 2, patch_size=8)
    words = r"block 1 of the student have 16 positions, .* block 1 of the teacher 4.*one resolution.*SimilarityM"
    with pytest.raises(DataError, match=words):
        term(model_of("convnext"), other, HiddenMatch([(1, 1)], **stacks("convnext")), image())
    assert term(model_of("convnext"), other, HiddenMatch([(1, 0)], projection="linear", **stacks("convnext")), image())


@pytest.mark.parametrize(
    "objective", [AttentionMatch, functools.partial(RelationMatch, relation_heads=2)], ids=["attention", "relations"]
)
def test_attention_within_windows_raises(objective: Any) -> None:
    """Swin puts windows on the first axis, so the mean would be multiplied by their number."""
    student, teacher = (made("swin", seed, image_size=64) for seed in (1, 2))
    words = r"the batch has 2 examples, but (queries|keys) of block 0 of the student are at \[32, 16\].*windows"
    with pytest.raises(DataError, match=words):
        term(student, teacher, objective([(0, 0)], **stacks("swin")), image(64))
    assert term(student, teacher, HiddenMatch([(0, 0)], **stacks("swin")), image(64)) > 0


class PlainConvolution(nn.Module):
    """A convolutional classifier that is not a transformers model."""

    def __init__(self, width: int, *, flat: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)])
        self.head, self.flat = nn.Linear(width, 2), flat

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return {"logits": self.head(pixel_values.mean((2, 3)))}


class OfAnotherInput(PlainConvolution):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]  # what the test is about
        return super().forward(x)


def test_a_plain_convolutional_module() -> None:
    student, teacher, batch = PlainConvolution(8), PlainConvolution(12), image()
    named = {"student_stack": "blocks", "teacher_stack": "blocks"}
    distiller = Distiller(
        student, teacher, objectives=HiddenMatch([(1, 1)], **named), alpha=None, task="classification", seed=0
    )
    weight = distiller.objectives["hidden"].learned.matrices["1_1"].weight.detach().double()
    s, t = (pixels(block_outputs(model, "blocks", batch)[1], FIRST) for model in (student, teacher))
    assert distiller(student, batch).loss.item() == pytest.approx(
        distance_by_hand("mean_squared", s @ weight.T, t), rel=1e-5
    )


def test_an_unknown_feature_axis_is_not_guessed() -> None:
    student, teacher = OfAnotherInput(8), OfAnotherInput(8)
    named = HiddenMatch([(1, 1)], student_stack="blocks", teacher_stack="blocks")
    distiller = Distiller(student, teacher, objectives=named, alpha=None, task="classification")
    with pytest.raises(
        SettingError, match=r"hidden of block 1 of the student \(blocks\) is \[2, 8, 8, 8\], .*not known"
    ):
        distiller(student, {"x": image()["pixel_values"]})


def test_a_module_in_half_precision() -> None:
    blocks = ActivationCapture(PlainConvolution(8).bfloat16(), "student").blocks(None, "blocks")
    assert blocks.features[HIDDEN, 1] == Features(1, 8)


@pytest.mark.parametrize(
    ("shape", "widths", "axis"),
    [((2, 16, 4, 4), [16], 1), ((2, 4, 4, 16), [16], 3), ((2, 16, 4, 16), [16], None), ((2, 4, 4, 4), [16], None),
     ((2, 16, 8, 8), [8, 16], None), ((2, 16), [16], None)],
)  # fmt: skip
def test_a_width_in_the_config_identifies_the_axis(shape: tuple[int, ...], widths: list[int], axis: Any) -> None:
    config, x = hf.ConvNextConfig(hidden_sizes=widths), torch.randn(shape)
    if axis is None:
        words = "which axis holds the features is not known" if x.dim() > 3 else "no axis is left for positions"
        with pytest.raises(SettingError, match=words):
            as_positions(x, None, config, what="this")
    else:
        assert torch.equal(as_positions(x, None, config, what="this"), pixels(x, FIRST if axis == 1 else LAST))


def test_a_model_without_a_last_hidden_state() -> None:
    """HGNet's classifier has no base model."""
    shape = {
        "embedding_size": 8, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8], "stage_mid_channels": [8, 8],
        "stage_out_channels": [8, 16], "stage_num_blocks": [1, 1], "stage_downsample": [False, True],
        "stage_light_block": [False, False], "stage_kernel_size": [3, 3], "stage_numb_of_layers": [1, 1],
        "stem_strides": [2, 1, 1, 2, 1], **_STAGES,
    }  # fmt: skip
    student, teacher = (hf.HGNetV2ForImageClassification(hf.HGNetV2Config(**shape)) for _ in range(2))
    named = {"student_stack": "encoder.stages", "teacher_stack": "encoder.stages"}
    with pytest.raises(
        SettingError, match=r"HGNetV2ForImageClassification returns no last_hidden_state\. Use HiddenMatch"
    ):
        term(student, teacher, CosineEmbedding(**named), image())
    assert term(student, teacher, HiddenMatch([(1, 1)], **named), image()) >= 0
