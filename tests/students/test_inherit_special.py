"""Special cases of single architectures and of the teacher's state; the other tests run over all architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hf_distill.errors import SettingError, TeacherError
from hf_distill.layer_map import LayerMap
from hf_distill.models.stacks import find_stacks
from hf_distill.students import inherit
from tests.students.models import MODELS, reported
from tests.students.test_inherit_architectures import assert_close_outputs, outputs


def test_t5_copies_the_position_table_of_layer_0_for_any_layers() -> None:
    tiny = MODELS["T5ForConditionalGeneration"]
    teacher = tiny.make()
    student, report = reported(inherit(teacher, encoder_layers=[1, 3], decoder_layers=[2]))
    table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for side in ("encoder", "decoder"):
        name = f"{side}.{table}"
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name))
        assert name in report.carried and f"{name}: serves all layers" in str(report)
    assert student.config.num_layers == 2 and student.config.num_decoder_layers == 1
    # The teacher without its other encoder blocks computes the same.
    blocks = teacher.encoder.block
    first = blocks[1]
    first.layer[0].SelfAttention.has_relative_attention_bias = True
    first.layer[0].SelfAttention.relative_attention_bias = blocks[0].layer[0].SelfAttention.relative_attention_bias
    teacher.encoder.block = torch.nn.ModuleList([first, blocks[3]])
    batch = {key: value for key, value in tiny.batch().items() if not key.startswith("decoder")}
    with torch.no_grad():
        ours, theirs = student.encoder(**batch), teacher.encoder(**batch)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_wavlm_copies_the_position_table_of_layer_0() -> None:
    teacher = MODELS["WavLMForCTC"].make()
    student, report = reported(inherit(teacher, layers=[2, 3]))
    (table,) = report.carried
    assert table.endswith("layers.0.attention.rel_attn_embed.weight")
    assert torch.equal(student.get_parameter(table), teacher.get_parameter(table))


def test_cutting_one_side_of_an_encoder_decoder() -> None:
    teacher = MODELS["BartForConditionalGeneration"].make()
    student, report = reported(inherit(teacher, decoder_layers=[0, -1]))
    assert (student.config.encoder_layers, student.config.decoder_layers) == (4, 2)
    assert [stack.path for stack in report.stacks] == ["model.decoder.layers"]
    assert report.copied["model.encoder.layers.3.fc1.weight"] == "model.encoder.layers.3.fc1.weight"
    assert report.copied["model.decoder.layers.1.fc1.weight"] == "model.decoder.layers.3.fc1.weight"


def test_a_layer_keeps_its_attention_type() -> None:
    teacher = MODELS["Qwen2ForCausalLM"].make()
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    student = inherit(teacher, layers=[0, 2, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert [block.self_attn.sliding_window for block in student.model.layers] == [None, 3, 3]


def test_modernbert_layer_0_cannot_move() -> None:
    teacher = MODELS["ModernBertForMaskedLM"].make()
    assert inherit(teacher, layers=1).config.num_hidden_layers == 1
    with pytest.raises(
        TeacherError, match=r"layer 2 of .* cannot become student layer 0.*attn_norm is Identity.*take teacher layer 0"
    ):
        inherit(teacher, layers=[2, 3])
    with pytest.raises(
        TeacherError, match=r"layer 0 of .* cannot become student layer 1.*it can only be student layer 0"
    ):
        inherit(teacher, layers=LayerMap.pairs([(0, 0), (1, 0)], 2, 4))


def test_gpt2_layers_scaled_by_position_cannot_move() -> None:
    tiny = MODELS["GPT2LMHeadModel"]
    teacher = tiny.make(scale_attn_by_inverse_layer_idx=True)
    assert inherit(teacher, layers=[0, 1]).config.n_layer == 2
    with pytest.raises(
        TeacherError, match=r"layer 3 of .* cannot become student layer 1.*attn.scaling is .*depends on its position"
    ):
        inherit(teacher, layers=2)


def test_albert_applies_its_shared_weights_fewer_times() -> None:
    tiny = MODELS["AlbertForMaskedLM"]
    teacher = tiny.make()
    student, report = reported(inherit(teacher, layers=[-1, 0]))
    assert student.config.num_hidden_layers == 2
    assert report.student_parameters == report.teacher_parameters and "share their weights" in str(report)
    states = (outputs(model, tiny.batch()) for model in (student, teacher))
    ours, theirs = ({key: value for key, value in one.items() if key.endswith((".1", ".2"))} for one in states)
    assert_close_outputs(ours, theirs)


def test_albert_with_groups_keeps_each_layer_in_its_group() -> None:
    teacher = MODELS["AlbertForMaskedLM"].make(num_hidden_groups=2)
    assert inherit(teacher, layers=2).config.num_hidden_layers == 2
    with pytest.raises(TeacherError, match=r"4 layers share 2 groups.*\[0, 1\] use groups \[0, 0\]; .* uses \[0, 1\]"):
        inherit(teacher, layers=[0, 1])


def test_convolutions_are_not_mistaken_for_layers() -> None:
    teacher = MODELS["Wav2Vec2ForCTC"].make(layers=2)  # two convolutions too
    student = inherit(teacher, layers=1)
    assert len(student.wav2vec2.feature_extractor.conv_layers) == 2 and len(student.wav2vec2.encoder.layers) == 1


def test_whisper_keeps_the_alignment_heads_of_kept_layers() -> None:
    teacher = MODELS["WhisperForConditionalGeneration"].make()
    teacher.generation_config.alignment_heads = [[1, 0], [3, 1], [2, 0]]
    student, report = reported(inherit(teacher, decoder_layers=[0, 3]))
    assert student.generation_config.alignment_heads == [[1, 1]] and "1 of 3" in report.notes[0]
    without = inherit(teacher, decoder_layers=[0])
    assert not hasattr(without.generation_config, "alignment_heads")
    assert teacher.generation_config.alignment_heads == [[1, 0], [3, 1], [2, 0]]


def test_weights_per_layer_are_cut_to_the_layers() -> None:
    teacher = MODELS["Wav2Vec2ForSequenceClassification"].make()
    student, report = reported(inherit(teacher, layers=[1, 3]))
    assert torch.equal(student.layer_weights, teacher.layer_weights[[0, 2, 4]]) and report.recut == ("layer_weights",)


def test_a_missing_pooler_stays_missing() -> None:
    tiny = MODELS["BertModel"]
    teacher = hf.BertModel(tiny.make().config, add_pooling_layer=False).eval()
    student = inherit(teacher, layers=4)
    assert student.pooler is None
    assert_close_outputs(outputs(student, tiny.batch()), outputs(teacher, tiny.batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = MODELS["LlamaForCausalLM"]
    tiny.make().save_pretrained(tmp_path)  # loaded and not cast: `.to(dtype)` would round rotary buffers too
    student = inherit(tiny.model_class.from_pretrained(tmp_path, dtype=dtype), layers=2)
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    student.save_pretrained(tmp_path)
    again = tiny.model_class.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert_close_outputs(outputs(again, tiny.batch()), outputs(student, tiny.batch()))


def test_mixed_dtypes_are_kept() -> None:
    teacher = MODELS["BertForMaskedLM"].make()
    teacher.bert.encoder.layer[3].to(torch.float64)
    student = inherit(teacher, layers=2)
    assert [block.output.dense.weight.dtype for block in student.bert.encoder.layer] == [torch.float32, torch.float64]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_the_attention_implementation_is_kept(name: str) -> None:
    tiny = MODELS[name]
    teacher = tiny.make()
    teacher.set_attn_implementation("eager")
    assert inherit(teacher, **dict.fromkeys(tiny.stacks, 2)).config._attn_implementation == "eager"


def test_a_teacher_during_training() -> None:
    teacher = MODELS["BertForMaskedLM"].make()
    # Newer versions of transformers use the first name, and warn about the second.
    enable = getattr(teacher, "activation_checkpointing_enable", None) or teacher.gradient_checkpointing_enable
    enable()
    teacher.train()
    student = inherit(teacher, layers=2)
    assert not student.training and teacher.training
    tensors = outputs(student, MODELS["BertForMaskedLM"].batch())
    assert_close_outputs(tensors, outputs(inherit(teacher.eval(), layers=2), MODELS["BertForMaskedLM"].batch()))


def test_tied_weights_are_one_tensor_and_train_as_one() -> None:
    teacher = MODELS["BertForMaskedLM"].make()
    student = inherit(teacher, layers=2).train()
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(**MODELS["BertForMaskedLM"].batch()).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(
        student.bert.encoder.layer[1].output.dense.weight, before["bert.encoder.layer.3.output.dense.weight"]
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())


def test_resized_embeddings_are_copied() -> None:
    teacher = MODELS["GPT2LMHeadModel"].make()
    teacher.resize_token_embeddings(44, mean_resizing=False)
    assert inherit(teacher, layers=2).get_input_embeddings().weight.shape == (44, 16)


def test_a_student_of_a_student() -> None:
    teacher = MODELS["BertForMaskedLM"].make()
    student = inherit(inherit(teacher, layers=[0, 1, 3]), layers=[0, 2])
    name = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(student.get_parameter(name.format(1)), teacher.get_parameter(name.format(3)))


def test_stacks_of_nested_models() -> None:
    tiny = MODELS["ViTModel"]
    decoder = MODELS["GPT2LMHeadModel"].make(add_cross_attention=True)
    teacher = hf.VisionEncoderDecoderModel(encoder=tiny.make(), decoder=decoder).eval()
    assert [(stack.name, str(stack.setting)) for stack in find_stacks(teacher)] == [
        ("encoder.layers", "config.encoder.num_hidden_layers"),
        ("decoder.transformer.h", "config.decoder.n_layer"),
    ]
    student = inherit(teacher, encoder_layers=2, decoder_layers=[0, -1])
    batch: dict[str, Any] = tiny.batch() | {"decoder_input_ids": torch.tensor([[1, 5], [1, 7]])}
    assert student.config.encoder.num_hidden_layers == 2 and student.config.decoder.n_layer == 2
    assert outputs(student, batch)["logits"].shape == (2, 2, 40)
    assert_close_outputs(outputs(inherit(teacher, encoder_layers=4), batch), outputs(teacher, batch))


def test_the_report_lists_copied_and_left_tensors() -> None:
    student, report = reported(inherit(MODELS["BertForMaskedLM"].make(), layers=2))
    assert set(report.copied) >= {name for name, _ in student.named_parameters()}
    assert report.student_parameters == student.num_parameters()
    assert sum("layer.1." in name or "layer.2." in name for name in report.left) == len(report.left) > 0
    assert "  bert.encoder.layer: 2 of 4 layers: 0←0 1←3" in str(report).splitlines()
    assert f"copied: {len(report.copied)} tensors; left behind: {len(report.left)}" in str(report)


def test_backbone_stages_follow_their_layers() -> None:
    teacher = MODELS["BeitForImageClassification"].make(out_indices=[1, 3, 4])
    student, report = reported(inherit(teacher, layers=[0, 2]))
    assert student.config.stage_names == ["stem", "stage1", "stage2"]
    assert student.config.out_indices == [1, 2] and student.config.out_features == ["stage1", "stage2"]
    assert report.notes == ("config.out_indices: [1, 2]; the teacher's: [1, 3, 4].",)
    assert inherit(MODELS["BeitForImageClassification"].make(), layers=[0, 1]).config.out_indices == [2]


def test_attention_windows_follow_their_layers() -> None:
    student = inherit(MODELS["LongformerForMaskedLM"].make(), layers=[0, 3])
    assert student.config.attention_window == [4, 8]
    assert [block.attention.self.one_sided_attn_window_size for block in student.longformer.encoder.layer] == [2, 4]


def test_a_block_spread_over_several_lists() -> None:
    """XLM keeps the attentions, feed-forward networks and norms of its layers in four lists."""
    sizes = {"vocab_size": 40, "emb_dim": 16, "n_layers": 4, "n_heads": 2, "max_position_embeddings": 32}
    teacher = hf.XLMWithLMHeadModel(hf.XLMConfig(**sizes)).eval()
    student = inherit(teacher, layers=[0, 3])
    for name in ("attentions.{}.q_lin.weight", "ffns.{}.lin1.weight", "layer_norm2.{}.weight"):
        ours, theirs = (model.transformer.get_parameter(name.format(n)) for model, n in ((student, 1), (teacher, 3)))
        assert torch.equal(ours, theirs)
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert_close_outputs(outputs(inherit(teacher, layers=4), batch), outputs(teacher, batch))


def test_one_of_two_unrelated_stacks() -> None:
    vision = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
    teacher = hf.CLIPModel(
        hf.CLIPConfig(
            text_config=vision | {"vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
            vision_config=vision | {"image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )
    with pytest.raises(
        SettingError, match=r"fits 2 of .*'text_model.encoder.layers' \(3 layers\), 'vision.* Use layers= and"
    ):
        inherit(teacher, layers=2)
    student = inherit(teacher, layers=2, stack="vision_model.encoder.layers")
    assert student.config.vision_config.num_hidden_layers == 2 and student.config.text_config.num_hidden_layers == 3


def test_stochastic_depth_is_not_a_difference() -> None:
    """Beit's layer 0 has an Identity where the other layers drop paths during training."""
    tiny = MODELS["BeitForImageClassification"]
    student = inherit(tiny.make(), layers=[1, 3])
    assert [type(block.drop_path).__name__ for block in student.beit.layers] == ["Identity", "BeitDropPath"]


def test_buffers_are_the_teachers() -> None:
    tiny = MODELS["LlamaForCausalLM"]
    teacher = tiny.make()
    teacher.model.rotary_emb.inv_freq.mul_(0.5)
    assert_close_outputs(outputs(inherit(teacher, layers=4), tiny.batch()), outputs(teacher, tiny.batch()))


def test_a_default_device_does_not_matter() -> None:
    teacher = MODELS["LlamaForCausalLM"].make()
    with torch.device("meta"):
        student = inherit(teacher, layers=2)
    assert {tensor.device.type for tensor in (*student.parameters(), *student.buffers())} == {"cpu"}
