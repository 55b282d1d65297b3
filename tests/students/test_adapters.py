"""Adapters on a student: what is trained, distilling activations, saving, and mistakes that PEFT accepts silently."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from hf_distill import Distiller, HiddenMatch, MissingExtraError, RelationMatch, SettingError
from hf_distill.students import check_adapters, save_merged
from tests.heads import HEADS
from tests.lora import with_lora
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, make, padded, weights

peft = pytest.importorskip("peft", reason="an optional extra")
OBJECTIVES = {"objectives": [HiddenMatch("even"), RelationMatch(relation_heads=2)]}


def student(seed: int = 0, **changed: Any) -> Any:
    """Half as wide as the teacher, with LoRA on queries and values that is no longer zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = with_lora(bert(seed=seed, num_hidden_layers=2, **changed), "query", "value", rank=2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def teacher() -> Any:
    return bert(seed=1, num_hidden_layers=2, hidden_size=32)


def trained(model: Any) -> set[str]:
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name.removeprefix("base_model.model.") for name in names}


def test_the_report_names_what_is_trained() -> None:
    model = with_lora(bert(num_hidden_layers=2), "query", "value", rank=2)
    report = check_adapters(model)
    of_layer = [f"bert.encoder.layer.{i}.attention.self.{t}.lora_{x}.default.weight"
                for i in (0, 1) for t in ("query", "value") for x in "AB"]  # fmt: skip
    head = {f"classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert trained(model) == {*of_layer, *head}
    assert report.head == ("classifier",) and len(report.adapted) == 4
    # Four modules of (2 × 16 + 16 × 2), and a head of 16 × 3 + 3.
    assert report.trainable_parameters == 4 * 64 + 51
    assert str(report).splitlines()[0] == "BertForSequenceClassification: LORA on 4 modules"
    assert f"trained: 307 of {report.parameters:,} parameters" in str(report) and "head: classifier" in str(report)


@pytest.mark.parametrize(
    ("name", "targets", "head"),
    [
        ("distilbert_single_label", ["q_lin"], ("pre_classifier", "classifier")),  # PEFT adds only the classifier
        ("bert_tokens", ["query"], ("classifier",)),
        ("bert_span", ["query"], ("qa_outputs",)),
        ("bert_multiple_choice", ["query"], ("classifier",)),
        ("wav2vec2_audio_class", ["q_proj"], ("projector", "classifier")),
        ("wav2vec2_ctc_mean", ["q_proj"], ("lm_head",)),
        ("vit_image_class", ["q_proj"], ("classifier",)),
    ],
)
def test_a_frozen_new_head_is_an_error(name: str, targets: list[str], head: tuple[str, ...]) -> None:
    frozen = peft.get_peft_model(HEADS[name].make(0), peft.LoraConfig(target_modules=targets))
    names = ", ".join(map(repr, head))
    with pytest.raises(SettingError, match=rf"the head \({', '.join(head)}\) is frozen.*modules_to_save=\[{names}\]"):
        check_adapters(frozen)
    assert check_adapters(frozen, allow_frozen_head=True).head == ()
    config = peft.LoraConfig(target_modules=targets, modules_to_save=list(head))
    assert check_adapters(peft.get_peft_model(HEADS[name].make(0), config)).head == head


def test_a_part_of_the_head_that_is_frozen_is_named() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["projector"])
    with pytest.raises(SettingError, match=r"the head \(classifier\) is frozen.*=\['projector', 'classifier'\]"):
        check_adapters(peft.get_peft_model(HEADS["wav2vec2_audio_class"].make(0), config))


@pytest.mark.parametrize(
    ("name", "target"),
    [("bert_masked_lm", "query"), ("llama_causal_lm", "q_proj"), ("t5_seq2seq", "q"), ("bert_embedding", "query")],
)
def test_a_pretrained_head_may_stay_frozen(name: str, target: str) -> None:
    model = peft.get_peft_model(HEADS[name].make(0), peft.LoraConfig(target_modules=[target]))
    report = check_adapters(model)
    assert report.head == () and report.adapted and "head: frozen" in str(report)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_fitting_task_type_passes(task_type: str | None) -> None:
    config = peft.LoraConfig(target_modules=["query"], task_type=task_type, modules_to_save=["classifier"])
    assert check_adapters(peft.get_peft_model(bert(), config)).head == ("classifier",)


def test_other_methods_of_peft() -> None:
    config = peft.IA3Config(target_modules=["key"], feedforward_modules=[], modules_to_save=["classifier"])
    report = check_adapters(peft.get_peft_model(bert(), config))
    assert report.method == "IA3" and report.adapted


def test_an_adapted_student_has_the_activations_of_the_merged_model() -> None:
    """Queries and values are captured with their adapter: the same losses as a plain model of the merged weights."""
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
def test_a_distilled_and_a_resumed_run(tmp_path, alpha: float | None) -> None:
    """The base does not change; a resumed run equals the uninterrupted one."""
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


def test_saving_the_adapter_alone_and_merged(tmp_path) -> None:
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["query", "valeu"]}, "target_modules names valeu, which the model .* modules: .*query"),
        ({"modules_to_save": ["classifier", "klassifier"]}, "modules_to_save names klassifier, which"),
        ({"inference_mode": True}, "no adapter is trained. Set inference_mode=False"),
        ({"task_type": "TOKEN_CLS"}, "task_type='TOKEN_CLS' does not fit. Use 'SEQ_CLS' or None"),
        ({"layers_to_transform": [0, 9]}, r"layers_to_transform=\[0, 9\]: layer 9 has no adapter.*adapters: 0\."),
    ],
)
def test_configs_that_name_something_else(config: dict[str, Any], message: str) -> None:
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"], **config}
    model = peft.get_peft_model(bert(num_hidden_layers=2), peft.LoraConfig(**settings))
    with pytest.raises(SettingError, match=message):
        check_adapters(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, None),
        ({"modules_to_save": ["classifier", "klassifier"]}, "modules_to_save names klassifier, which"),
        ({"modules_to_save": None}, r"the head \(classifier\) is frozen"),  # it may be trained already
    ],
)
def test_the_trainer_warns_of_them_and_trains(tmp_path, caplog, config: dict[str, Any], message: str | None) -> None:
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"], **config}
    model = peft.get_peft_model(bert(num_hidden_layers=2), peft.LoraConfig(**settings))
    trainer = make(tmp_path, model, teacher(), train_dataset=examples(4), data_collator=padded, max_steps=1)
    found = [record.message for record in caplog.records if "check_adapters" in record.message]
    assert len(found) == (message is not None) and all(re.search(message or "", text) for text in found)
    assert trainer.train().global_step == 1


def test_a_task_type_of_text_on_a_speech_model() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["projector"])
    with pytest.raises(SettingError, match=r"task_type='SEQ_CLS' does not fit. Use None"):
        check_adapters(peft.get_peft_model(HEADS["wav2vec2_audio_class"].make(0), config))


def test_an_adapter_that_was_loaded_for_inference(tmp_path) -> None:
    student().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bert(num_hidden_layers=2), tmp_path)
    with pytest.raises(SettingError, match=r"no adapter is trained.*is_trainable=True"):
        check_adapters(loaded)
    check_adapters(peft.PeftModel.from_pretrained(bert(num_hidden_layers=2), tmp_path, is_trainable=True))


def test_models_that_cannot_be_checked_or_merged(tmp_path) -> None:
    for call in (check_adapters, lambda model: save_merged(model, tmp_path)):
        with pytest.raises(
            SettingError, match=r"a BertForSequenceClassification is not a PeftModel\. Use peft.get_peft"
        ):
            call(bert())
    tokens = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(bert(), tokens)
    assert check_adapters(model).adapted == ()
    with pytest.raises(SettingError, match="PROMPT_TUNING changes the input, not the weights"):
        save_merged(model, tmp_path)
    quantised = student()
    quantised.get_base_model().is_quantized = True
    with pytest.raises(SettingError, match=r"the base is quantised. Merge the saved adapter"):
        save_merged(quantised, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_peft(monkeypatch) -> None:
    model = student()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'peft is not installed.*pip install "hf-distill\[peft\]"'):
        check_adapters(model)


def test_distilling_a_quantised_student(tmp_path) -> None:
    """QLoRA on the CPU: the teacher in 4 bits too."""
    pytest.importorskip("bitsandbytes", reason="an optional extra")
    wide = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    bert(**wide).save_pretrained(tmp_path / "base")

    def in_4_bits() -> Any:
        config = tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
        )
        return tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", quantization_config=config)

    prepared = peft.prepare_model_for_kbit_training(in_4_bits(), use_gradient_checkpointing=False)
    model = with_lora(prepared, "query", "value")
    assert check_adapters(model).head == ("classifier",)
    objectives = [HiddenMatch("even"), RelationMatch(relation_heads=2)]
    trainer = make(tmp_path, model, in_4_bits(), objectives=objectives, learning_rate=0.1)
    start = weights(model)
    trainer.train()
    end = weights(model)
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    assert moved and all(".lora_" in name or ".modules_to_save." in name for name in moved)
    model.save_pretrained(Path(tmp_path) / "adapter")
    with pytest.raises(SettingError, match="the base is quantised"):
        save_merged(model, tmp_path / "merged")
