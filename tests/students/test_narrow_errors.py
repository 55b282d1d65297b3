"""Errors of `narrow`, and architectures beyond the supported ones: they are cut correctly or raise an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch.testing import assert_close

from hf_distill.errors import DataError, HfDistillError, TeacherError
from hf_distill.students.narrow.narrow import narrow
from tests.students.models import MODELS
from tests.students.narrow_models import teacher_of

BERT, LLAMA = "BertForSequenceClassification", "LlamaForCausalLM"
DATA = [MODELS[BERT].batch()]
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": (BERT, {}, r"pass a smaller size: hidden=, heads=, intermediate= and/or vocabulary="),
    "no data": (BERT, {"intermediate": 8}, r"intermediate: importance is measured on data. Pass data="),
    "empty data": (BERT, {"intermediate": 8, "data": []}, r"data= has no batch"),
    "strange data": (BERT, {"intermediate": 8, "data": ["a"]}, r"data= contains a str. Pass batches: dicts"),
    "other columns": (BERT, {"intermediate": 8, "data": [{"x": torch.ones(1)}]}, r"columns x; the teacher reads att"),
    "zero": (BERT, {"intermediate": 0, "data": DATA}, r"intermediate=0 is not a whole number of at least 1"),
    "text": (BERT, {"hidden": "8", "data": DATA}, r"hidden='8' is not a whole number"),
    "bool": (BERT, {"heads": True, "data": DATA}, r"heads=True is not a whole number"),
    "too many neurons": (BERT, {"intermediate": 33, "data": DATA}, r"33: the teacher has 32 \(config.inter"),
    "too wide": (BERT, {"hidden": 20, "heads": 4, "data": DATA}, r"20: the teacher has 16 \(config.hid"),
    "too many heads": (BERT, {"heads": 5, "data": DATA}, r"heads=5: the teacher has 4 \(config.num_attention_heads\)"),
    "heads alone": (BERT, {"heads": 2, "data": DATA}, r"hidden=16 with heads=2: a head .* size of 4. Try hidden=8"),
    "hidden alone": (BERT, {"hidden": 8, "data": DATA}, r"hidden=8 with heads=4: .* size of 4. Try heads=2"),
    "not a multiple": (BERT, {"hidden": 10, "heads": 2, "data": DATA}, r"hidden=10 with heads=2.* Try hidden=8"),
    "importance": (BERT, {"intermediate": 8, "importance": "size"}, r"importance='size': allowed are activation and"),
    "no loss": (BERT, {"intermediate": 8, "data": DATA, "importance": "gradient"}, r"needs a loss. Pass data= with"),
    "no groups": (BERT, {"hidden": 8, "heads": 2, "key_value_heads": 1, "data": DATA}, r"no key-value heads"),
    "groups alone": (LLAMA, {"key_value_heads": 1, "data": DATA}, r"key_value_heads= goes with heads="),
    "groups do not divide": (LLAMA, {"heads": 3, "data": DATA}, r"they must divide heads=3. Pass one of 1"),
    "groups too small": (LLAMA, {"heads": 3, "key_value_heads": 1, "data": DATA}, r"3 heads each, .* heads=2 or"),
    "the config's own rule": (LLAMA, {"hidden": 13, "data": DATA}, r"does not allow .* \(13\) is not a multiple"),
    "width of embeddings": ("ElectraForMaskedLM", {"hidden": 8, "heads": 2, "data": DATA}, r"not fill the student"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    name, arguments, message = WRONG[case]
    with pytest.raises(HfDistillError, match=message):
        narrow(teacher_of(name, layers=1), **arguments)


def test_unknown_arguments_and_unsupported_teachers() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'layers'"):
        narrow(teacher_of(BERT), layers=2)  # type: ignore[call-overload]  # the mistake under test
    with pytest.raises(TeacherError, match=r"narrow: the teacher \(str\) is not a PreTrainedModel"):
        narrow("bert-base-uncased", hidden=8)  # type: ignore[call-overload]  # the mistake under test
    clip = hf.CLIPConfig(text_config={"vocab_size": 40}, vision_config={"image_size": 8, "patch_size": 4})
    with torch.device("meta"):
        two_towers = hf.CLIPModel(clip)
    two_towers = two_towers.to_empty(device="cpu")
    with pytest.raises(HfDistillError, match=r"contains several models"):
        narrow(two_towers, intermediate=8, data=[{"input_ids": torch.ones(1, 3, dtype=torch.long)}])
    teacher = teacher_of("Wav2Vec2ForCTC", num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=4)
    narrow(teacher, hidden=12, heads=3, data=[MODELS["Wav2Vec2ForCTC"].batch()])
    with pytest.raises(HfDistillError, match=r"hidden= must be a multiple of 8, the groups of a convolution"):
        teacher = teacher_of("Wav2Vec2ForCTC", num_conv_pos_embedding_groups=8)
        narrow(teacher, hidden=12, heads=3, data=[MODELS["Wav2Vec2ForCTC"].batch()])


def test_a_teacher_changed_by_hand_is_an_error() -> None:
    teacher = teacher_of(BERT)
    teacher.classifier = torch.nn.Linear(16, 5)
    with pytest.raises(TeacherError, match=r"the teacher does not fill the student: classifier.weight \(3, 16\)"):
        narrow(teacher, intermediate=8, data=DATA)


def test_an_unknown_layout_is_an_error() -> None:
    """GPT-NeoX fuses query, key and value of each head, so cutting three blocks would be wrong."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "bos_token_id": 1}
    teacher = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, intermediate_size=32, eos_token_id=2))
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    with pytest.raises(TeacherError, match=r"heads= cannot be cut in GPTNeoXForCausalLM: permuting its units"):
        narrow(teacher, hidden=8, heads=2, data=[batch])
    assert narrow(teacher, intermediate=8, data=[batch]).config.intermediate_size == 8


def test_architectures_beyond_the_supported_ones() -> None:
    """Another setting of OPT holds the width of its embeddings; Falcon's config cannot set a head's size."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
    batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    wide = hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16))
    student = narrow(wide.eval(), hidden=8, heads=2, data=[batch])
    assert (student.config.word_embed_proj_dim, student.config.hidden_size) == (8, 8)
    same = narrow(wide, hidden=16, heads=4, data=[batch])
    with torch.no_grad():
        assert_close(same(**batch).logits, wide(**batch).logits)
    with pytest.raises(TeacherError, match=r"query_key_value.weight does not double with config.hidden_size"):
        narrow(hf.FalconForCausalLM(hf.FalconConfig(**sizes)), hidden=8, heads=2, data=[batch])
    experts = hf.MixtralConfig(**sizes, intermediate_size=32, num_key_value_heads=2, num_local_experts=4)
    with pytest.raises(TeacherError, match=r"gate_up_proj has an axis of neurons, but .* no matrix that reads them"):
        narrow(hf.MixtralForCausalLM(experts), intermediate=8, data=[batch])


def test_an_error_in_a_forward_restores_the_modes() -> None:
    teacher = teacher_of(BERT).train()
    with pytest.raises(DataError):
        narrow(teacher, intermediate=8, data=DATA, importance="gradient")
    assert all(module.training for module in teacher.modules())
