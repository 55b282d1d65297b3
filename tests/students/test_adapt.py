"""Adapters on a student: what is trained, distillation on its inside, saving, and what PEFT lets pass in silence."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from hf_distill import Distiller, HiddenMatch, MissingExtraError, RelationMatch, SettingError
from hf_distill.students.adapt import adapt, save_merged
from tests.heads import HEADS
from tests.students.models import reported
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, weights

peft = pytest.importorskip("peft", reason="an optional extra")
# PEFT asks transformers for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
OBJECTIVES = {"objectives": [HiddenMatch("even"), RelationMatch(relation_heads=2)]}


def student(seed: int = 0, **changed: Any) -> Any:
    """Half as wide as the teacher, with LoRA on queries and values that is no longer zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        made = adapt(bert(seed=seed, num_hidden_layers=2, **changed), targets=["query", "value"], rank=2)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return made


def teacher() -> Any:
    return bert(seed=1, num_hidden_layers=2, hidden_size=32)


def trained(model: Any) -> set[str]:
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name.removeprefix("base_model.model.") for name in names}


def test_the_adapter_and_the_fresh_head_are_trained_and_nothing_else() -> None:
    model, report = reported(adapt(
        bert(num_hidden_layers=2), targets=["query", "value"], rank=2
    ))  # fmt: skip
    of_layer = [f"bert.encoder.layer.{i}.attention.self.{t}.lora_{x}.default.weight"
                for i in (0, 1) for t in ("query", "value") for x in "AB"]  # fmt: skip
    head = {f"classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert trained(model) == {*of_layer, *head}
    assert report.head == ("classifier",) and len(report.adapted) == 4
    # Four modules of (2 × 16 + 16 × 2), and a head of 16 × 3 + 3.
    assert report.trainable_parameters == 4 * 64 + 51
    assert str(report).splitlines()[0] == "BertForSequenceClassification: LORA on 4 modules"
    assert f"trained: 307 of {report.parameters:,} parameters" in str(report) and "whole: classifier" in str(report)


@pytest.mark.parametrize(
    ("name", "targets", "head"),
    [
        # PEFT's own list has no pre_classifier.
        ("distilbert_single_label", ["q_lin"], ("pre_classifier", "classifier")),
        ("bert_tokens", ["query"], ("classifier",)),
        ("bert_span", ["query"], ("qa_outputs",)),
        ("bert_multiple_choice", ["query"], ("classifier",)),
        ("wav2vec2_audio_class", ["q_proj"], ("projector", "classifier")),
        ("wav2vec2_ctc_mean", ["q_proj"], ("lm_head",)),
        ("vit_image_class", None, ("classifier",)),
        ("bert_masked_lm", ["query"], ()),
        ("llama_causal_lm", ["q_proj"], ()),
        ("t5_seq2seq", ["q"], ()),
        ("bert_embedding", ["query"], ()),
    ],
)
def test_which_heads_are_trained(name: str, targets: Any, head: tuple[str, ...]) -> None:
    plain = HEADS[name].make(0)
    if targets is None:
        targets = "all-linear"
    model, report = reported(adapt(plain, targets=targets))
    assert report.head == head
    whole = {n.split(".modules_to_save")[0] for n in trained(model) if ".modules_to_save." in n}
    assert {n.split(".")[0] for n in whole} == set(head)
    assert any("lora_" in n for n in trained(model))
    assert not [n for n in report.adapted if n.split(".")[0] in head]


def test_the_head_can_be_left_or_asked_for() -> None:
    _, left = reported(adapt(bert(), targets=["query"], train_head=False))
    assert left.head == ()
    _, asked = reported(adapt(HEADS["bert_masked_lm"].make(0), targets=["query"], train_head=True))
    assert asked.head == ("cls",)
    own = peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler"])
    _, kept = reported(adapt(bert(), own))
    assert kept.head == ("pooler",)
    assert own.target_modules == {"query"} and own.modules_to_save == ["pooler"]


def test_gpt2s_transposed_weights_bring_no_warning() -> None:
    model, report = reported(adapt(HEADS["gpt2_causal_lm"].make(0), targets=["c_attn"]))
    assert report.adapted and model.active_peft_config.fan_in_fan_out is True


@pytest.mark.parametrize("config", [peft.IA3Config(target_modules=["key"], feedforward_modules=[]), "lora"])
def test_any_config(config: Any) -> None:
    _, report = reported(adapt(bert(), config))
    assert report.method in ("IA3", "LORA") and report.adapted


def test_the_inside_of_an_adapted_student_is_that_of_the_merged_one() -> None:
    """Queries and values are read with their adapter: the same losses as a plain model of the merged weights."""
    with_adapter, theirs = student().double().eval(), teacher().double()
    merged = student().double().merge_and_unload().eval()
    batch = padded(examples(4))
    losses = []
    for model in (with_adapter, merged):
        objectives = [HiddenMatch("even"), RelationMatch(relation_heads=2)]
        distiller = Distiller(model, theirs, objectives=objectives, seed=0)
        losses.append({name: term.item() for name, term in distiller(model, batch).terms.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert set(losses[0]) == {"labels", "logits", "hidden", "relations"}
    base = student().unload().double().eval()
    distiller = Distiller(base, theirs, objectives=[RelationMatch(relation_heads=2)], seed=0)
    assert distiller(base, batch).terms["relations"].item() != pytest.approx(losses[1]["relations"], rel=1e-3)


@pytest.mark.parametrize("alpha", [0.5, None])
def test_distilled_and_resumed(tmp_path, alpha: float | None) -> None:
    """The base is left as it was; a resumed run is the uninterrupted one."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "alpha": alpha}
    given = {**settings, **OBJECTIVES, "train_dataset": examples(12)}
    whole = make(tmp_path / "whole", student(dropout=0.3), teacher(), **given)
    start = weights(whole.model)
    whole.train()
    end = weights(whole.model)
    moving = [n for n in end if ".lora_" in n or (alpha is not None and ".modules_to_save." in n)]
    assert_moved({n: end[n] for n in moving}, {n: start[n] for n in moving})
    assert_same_bits({n: end[n] for n in end if n not in moving}, {n: start[n] for n in end if n not in moving})
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-2"
    assert (checkpoint / "distill_state.safetensors").is_file()
    assert all("lora_" in n or "classifier" in n for n in load_file(checkpoint / "adapter_model.safetensors"))
    other = student(dropout=0.3)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    resumed = make(tmp_path / "resumed", other, teacher(), **given)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(weights(resumed.model), end)


def test_saved_alone_and_merged(tmp_path) -> None:
    model = student().eval()
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.add_(0.5)
    batch = padded(examples(4))
    expected, before = model(**batch).logits, weights(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(bert(num_hidden_layers=2), tmp_path / "adapter").eval()
    assert torch.equal(again(**batch).logits, expected)

    returned = save_merged(model, tmp_path / "merged")
    assert_same_bits(weights(model), before)
    plain, loading = tf.BertForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())
    assert type(returned) is type(plain) is tf.BertForSequenceClassification
    assert (plain.eval()(**batch).logits - expected).abs().max() < 1e-5
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["config.json", "model.safetensors"]
    assert (expected - bert(num_hidden_layers=2).eval()(**batch).logits).abs().max() > 0.1


def refused(message: str, *given: Any, plain: Any = None, **named: Any) -> None:
    """The student is left as it was then."""
    plain = plain or bert(num_hidden_layers=2)
    before = weights(plain)
    with pytest.raises(SettingError, match=message):
        adapt(plain, *given, **named)
    assert_same_bits(weights(plain), before)
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["nothere"]}, "target_modules names nothere, and Bert.* no such module. Its mod.*query"),
        ({"target_modules": ["query", "valeu"]}, "target_modules names valeu, and"),
        ({"target_modules": ["query"], "modules_to_save": ["klassifier"]}, "modules_to_save names klassifier, and"),
        ({"target_modules": ["query"], "inference_mode": True}, "inference_mode=True trains nothing. Set it to Fal"),
        ({"target_modules": ["query"], "task_type": "CAUSAL_LM"}, "'CAUSAL_LM' is not that of .*it is 'SEQ_CLS'"),
        ({"target_modules": ["query"], "task_type": "TOKEN_CLS"}, "'TOKEN_CLS' is not that of BertForSequen"),
        ({"target_modules": "no.*such"}, "LORA: No modules were targeted.* Linear modules of the student: "),
        ({"target_modules": []}, "LORA: No modules were targeted"),
    ],
)  # fmt: skip
def test_configs_that_target_nothing_or_something_else(config: dict[str, Any], message: str) -> None:
    refused(message, peft.LoraConfig(**config))


def test_without_a_choice_of_peft_its_modules_are_asked_for() -> None:
    plain = HEADS["distilbert_single_label"].make(0)
    refused(
        r"PEFT has no choice of modules for DistilBertForSeq.*\. Pass targets=, or 'all-linear'\. .*q_lin", plain=plain
    )


def test_layers_that_are_not_there() -> None:
    with pytest.raises(SettingError, match=r"layers_to_transform=\[0, 9\]: layer 9 has no module .* layers 0\."):
        adapt(bert(num_hidden_layers=2), peft.LoraConfig(target_modules=["query"], layers_to_transform=[0, 9]))


def test_settings_that_cannot_be() -> None:
    refused("config='dora'. Give 'lora', or a PeftConfig", "dora")
    refused("rank=0. Give a whole number", rank=0)
    refused("targets= and rank= are of config='lora'", peft.LoraConfig(target_modules=["query"]), rank=4)
    bare = _unfrozen(HEADS["bert_embedding"].make(0))
    refused("has no modules beside its encoder", targets=["query"], train_head=True, plain=bare)
    speech = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    refused("leave task_type out", speech, plain=_unfrozen(HEADS["wav2vec2_audio_class"].make(0)))
    with pytest.raises(SettingError, match=r"has adapters already\. Merge them first"):
        adapt(student().get_base_model())
    with pytest.raises(SettingError, match=r"is a Linear\. Give a PreTrainedModel"):
        adapt(torch.nn.Linear(1, 1))


def _unfrozen(model: Any) -> Any:
    return model.requires_grad_(True)


def test_what_cannot_be_merged(tmp_path) -> None:
    with pytest.raises(SettingError, match=r"a BertForSequenceClassification has no adapter\. Save it"):
        save_merged(bert(), tmp_path)
    tokens = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapt(bert(), tokens)
    with pytest.raises(SettingError, match="PROMPT_TUNING adds to the input, not to the weights"):
        save_merged(model, tmp_path)
    quantised = student()
    quantised.get_base_model().is_quantized = True
    with pytest.raises(SettingError, match="the base is quantised, and merging would round the adapter away"):
        save_merged(quantised, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_what_is_optional(monkeypatch) -> None:
    plain = bert()
    plain.is_quantized, plain.quantization_method = True, "bitsandbytes"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r'bitsandbytes is not installed.*pip install "hf-distill\[qlora\]"'):
        adapt(plain, targets=["query"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'peft is not installed.*pip install "hf-distill\[peft\]"'):
        adapt(bert())


def test_a_quantised_student_is_made_ready_and_its_head_must_not_be(tmp_path) -> None:
    """QLoRA on the CPU: the teacher in 4 bits too."""
    pytest.importorskip("bitsandbytes", reason="an optional extra")
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    bert(**wide).save_pretrained(tmp_path / "base")

    def in_4_bits(**settings: Any) -> Any:
        config = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)
        return tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", quantization_config=config)

    with pytest.raises(SettingError, match=r'classifier is to be trained whole, and is quantised.*\["classifier"\]'):
        adapt(in_4_bits(), targets=["query", "value"])
    model, report = reported(adapt(
        in_4_bits(llm_int8_skip_modules=["classifier"]), targets=["query", "value"]
    ))  # fmt: skip
    assert report.quantised == "4 bits" and report.head == ("classifier",)
    theirs = in_4_bits(llm_int8_skip_modules=["classifier"])
    objectives = [HiddenMatch("even"), RelationMatch(relation_heads=2)]
    trainer = make(tmp_path, model, theirs, objectives=objectives, learning_rate=0.1)
    start = weights(model)
    trainer.train()
    end = weights(model)
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    assert moved and all(".lora_" in name or ".modules_to_save." in name for name in moved)
    model.save_pretrained(Path(tmp_path) / "adapter")
    with pytest.raises(SettingError, match="the base is quantised"):
        save_merged(model, tmp_path / "merged")
