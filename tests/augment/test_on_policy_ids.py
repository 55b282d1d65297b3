"""OnPolicy: the ids that the student may generate, the generation settings that apply, and the allowed teachers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hf_distill import Ensemble, SettingError
from hf_distill.augment import OnPolicy
from hf_distill.augment.on_policy import ids_not_shared
from hf_distill.models.generation import set_generation
from hf_distill.tasks import infer_task
from hf_distill.trainer.checks import check_on_policy
from hf_distill.vocabulary import HeadAlignment
from tests.augment.making import PrecomputedTeacher
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import make

LLAMA = HEADS["llama_causal_lm"]
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
WORDS = 40  # known to the tokenizers; the examples use smaller ids
PROMPTS = {"input_ids": torch.tensor([[5, 6]]).expand(60, 2)}


def llama(seed: int, width: int, **settings: Any) -> Any:
    """Return a model whose likeliest columns have no token."""
    model = LLAMA.make(seed, vocab_size=width, **settings)
    with torch.no_grad():
        model.lm_head.weight[WORDS:] = 3 * model.lm_head.weight[3]
    return model


class Recording(OnPolicy):
    def __call__(self, batch: Any, student: Any, **key: Any) -> Any:
        shown = super().__call__(batch, student, **key)
        self.written = shown["labels"][shown["labels"] != -100]
        return shown


@pytest.mark.parametrize(("ours", "theirs", "both"), [(60, 46, True), (46, 60, True), (46, 46, True), (46, 46, False)])
def test_padded_columns_are_not_generated(tmp_path, ours: int, theirs: int, both: bool) -> None:
    """If the heads have the same width, the student's tokenizer alone decides which columns are tokens."""
    view = Recording(student_share=1.0, max_new_tokens=6)
    trainer = make(
        tmp_path, llama(1, ours), llama(2, theirs), on_policy=view, train_dataset=LLAMA.examples(8), max_steps=1,
        alpha=1.0,
        data_collator=LLAMA.collate, processing_class=tokenizer(WORDS),
        teacher_processing_class=tokenizer(WORDS) if both else None,
    )  # fmt: skip
    trainer.train()
    assert len(view.written) > 8 and view.written.max() < WORDS


def test_tokens_are_drawn_from_the_remaining_columns() -> None:
    """For 20,000 tokens, frequencies equal the softmax over the remaining columns up to 5 standard errors."""
    student, view = llama(1, 46), OnPolicy(student_share=1.0, max_new_tokens=1)
    view.bind(student, infer_task(student), processing_class=tokenizer(WORDS))
    drawn = view({"input_ids": PROMPTS["input_ids"][:1].expand(20_000, 2)}, student, step=0)["labels"][:, 2]
    with torch.no_grad():
        expected = student(input_ids=PROMPTS["input_ids"][:1]).logits[0, -1, :WORDS].double().softmax(-1)
    found = drawn.bincount(minlength=WORDS) / len(drawn)
    assert len(found) == WORDS
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-6).all()


@OLD_NAME
def test_ids_that_the_teacher_does_not_share() -> None:
    def teacher(compared: Any, *embedded: int) -> Any:
        models = [LLAMA.make(1, vocab_size=many) for many in embedded]
        return SimpleNamespace(alignment=HeadAlignment(student=compared), models=lambda: models)

    student = LLAMA.make(1, vocab_size=12)
    gaps = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 5, "c": 11, "never": 30})
    assert ids_not_shared(student) == ids_not_shared(student, teacher(None, 12)) == []
    assert ids_not_shared(student, teacher(10, 12)) == [10, 11]
    assert ids_not_shared(student, teacher((0, 1, 2, 5, 11), 12)) == [3, 4, 6, 7, 8, 9, 10]
    assert ids_not_shared(student, teacher(None, 12, 30, 9)) == [9, 10, 11]  # one member cannot embed them
    assert ids_not_shared(student, teacher(11, 12), gaps) == [i for i in range(12) if i not in (0, 5)]
    adapted = peft.get_peft_model(student, peft.LoraConfig(target_modules=["lm_head", "embed_tokens"], r=2))
    assert ids_not_shared(adapted, teacher(None, 9)) == [9, 10, 11]


def test_an_end_token_unknown_to_the_teacher(tmp_path) -> None:
    ours = tokenizer(WORDS, added=["end"])
    ours.eos_token = "end"
    student = llama(1, 46, eos_token_id=WORDS)
    with pytest.raises(SettingError, match=r"texts end with \[40\], which student, teacher and tokenizer do not share"):
        make(
            tmp_path, student, llama(2, 46), on_policy=OnPolicy(), alpha=1.0, train_dataset=LLAMA.examples(4),
            processing_class=ours, teacher_processing_class=tokenizer(WORDS),
        )  # fmt: skip


NOT_FOLLOWED: list[dict[str, Any]] = [
    {"suppress_tokens": [3, 4]}, {"begin_suppress_tokens": [3]}, {"bad_words_ids": [[3], [4, 5]]}, {"min_length": 20},
    {"min_new_tokens": 3}, {"forced_eos_token_id": 2}, {"sequence_bias": [[[3], 50.0]]}, {"guidance_scale": 3.0},
    {"exponential_decay_length_penalty": [1, 5.0]}, {"encoder_repetition_penalty": 3.0}, {"top_h": 0.1},
    {"encoder_no_repeat_ngram_size": 1}, {"return_dict_in_generate": True, "output_scores": True}, {"max_time": 0.0},
    {"stop_strings": ["a"]}, {"prompt_lookup_num_tokens": 2}, {"dola_layers": "high"}, {"token_healing": True},
    {"watermarking_config": {"bias": 5.0, "seeding_scheme": "lefthash"}}, {"num_beams": 4, "num_return_sequences": 2},
    {"temperature": 0.1, "top_k": 1, "top_p": 0.1, "typical_p": 0.2, "min_p": 0.5},
]  # fmt: skip


def written(student: Any) -> list[list[int]]:
    return OnPolicy(student_share=1.0, max_new_tokens=3)(PROMPTS, student, step=0)["labels"].tolist()


def test_sampling_ignores_processors_in_the_generation_config() -> None:
    plain = written(LLAMA.make(1))
    for asked in NOT_FOLLOWED:
        student = LLAMA.make(1)
        set_generation(student.generation_config, asked)
        kept, before = student.generation_config, student.generation_config.to_dict()
        assert written(student) == plain, asked
        assert student.generation_config is kept and kept.to_dict() == before
        with pytest.raises(SettingError, match="max_new_tokens=0"):
            OnPolicy(max_new_tokens=0).bind(student, infer_task(student))
        assert student.generation_config is kept
    student = LLAMA.make(1)
    student.generation_config.eos_token_id = [2, plain[0][2]]  # special tokens still apply
    assert written(student)[0] == plain[0][:3] + [-100] * (len(plain[0]) - 3)


@OLD_NAME
def test_a_peft_model_with_its_own_generation_config() -> None:
    """PEFT copies that config to the base model at each call."""
    student = peft.get_peft_model(LLAMA.make(1), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2))
    student.generation_config = tf.GenerationConfig(suppress_tokens=[*range(3, 30)], eos_token_id=2, pad_token_id=0)
    own, inner = student.generation_config, student.get_base_model().generation_config
    assert written(student) == written(LLAMA.make(1))
    assert student.generation_config is own and student.get_base_model().generation_config is inner


def test_an_encoder_decoder_uses_its_own_end_and_language_tokens() -> None:
    shape = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    shape |= {"vocab_size": 40, "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = tf.BartForConditionalGeneration(tf.BartConfig(**shape))
    assert student.generation_config.forced_eos_token_id == 2
    full = [row for row in written(student) if -100 not in row]
    assert len(full) > 30 and sum(row[-1] == 2 for row in full) < 10  # 40 tokens are about equally likely
    student.generation_config.forced_bos_token_id = 7
    assert {row[0] for row in written(student)} == {7}


def test_an_ensemble_is_accepted_unless_a_member_is_precomputed(tmp_path) -> None:
    view, settings = Recording(student_share=1.0, max_new_tokens=2), {"alpha": 1.0, "max_steps": 1}
    data = {"train_dataset": LLAMA.examples(4), "data_collator": LLAMA.collate}
    inner = Ensemble([LLAMA.make(3), LLAMA.make(4)])
    trainer = make(tmp_path, LLAMA.make(1), Ensemble([LLAMA.make(2), inner]), on_policy=view, **data, **settings)
    trainer.train()
    assert len(view.written)
    inner.teachers[1].__class__ = PrecomputedTeacher
    trainer._on_policy_checked = None
    with pytest.raises(SettingError, match="a cached teacher has no answers for them"):
        check_on_policy(trainer)


def test_the_error_names_tensor_parallelism(tmp_path) -> None:
    trainer = make(tmp_path, LLAMA.make(1), LLAMA.make(2), on_policy=OnPolicy(), alpha=1.0)
    trainer._on_policy_checked, trainer.model._tp_size = None, 2
    with pytest.raises(SettingError, match="with tensor parallelism no process holds all of it"):
        check_on_policy(trainer)


def test_invalid_on_policy_arguments_raise(tmp_path) -> None:
    for view, message in (
        ("on-policy", "on_policy='on-policy': must be an object such as"),
        (OnPolicy, "must be an object such as"),
        (lambda batch: batch, "data_collator=hf_distill.augment.AugmentingCollator"),
    ):
        with pytest.raises(SettingError, match=message):
            make(tmp_path, LLAMA.make(1), LLAMA.make(2), on_policy=view, alpha=1.0)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_process(tmp_path) -> Any:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_on_policy_with_a_ddp_student(one_process: Any) -> None:
    student: nn.Module = DistributedDataParallel(LLAMA.make(1))
    OnPolicy().bind(student, infer_task(LLAMA.make(1)))
    assert written(student) == written(LLAMA.make(1))
