"""Distil with a Trainer of one's own: a `Distiller` in three of its methods. A BERT-base into a DistilBERT on SST-2."""

import sys
from dataclasses import dataclass, field

import smoke
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from hf_distill import Distiller, ModelTeacher


@dataclass
class ScriptArguments:
    teacher: str = field(default="textattack/bert-base-uncased-SST-2", metadata={"help": "A folder or Hub id."})
    student: str = field(default="distilbert/distilbert-base-uncased", metadata={"help": "A folder or Hub id."})
    temperature: float = field(default=2.0, metadata={"help": "Softens the logits of both models."})
    alpha: float = field(default=0.9, metadata={"help": "Weight of the teacher's term; the labels' is 1 - alpha."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models and data, offline, in seconds."})


class OwnTrainer(Trainer):
    loss_is_scaled_for_ga = True  # every term is a mean over the whole optimizer step already

    def __init__(self, *positional, distiller, **keywords) -> None:
        super().__init__(*positional, **keywords)
        self.distiller = distiller
        distiller.to(self.accelerator)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.step = self.distiller.begin_step(batches, self.accelerator)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        out = self.distiller(model, inputs, self.step, keep_logits=return_outputs)
        self.log({f"loss/{name}": value.item() for name, value in out.terms.items()})
        return (out.loss, out.outputs) if return_outputs else out.loss


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=__doc__)
    parser.set_defaults(output_dir="sst2-student", **(smoke.SETTINGS if "--smoke" in sys.argv else {}))
    ours, args = parser.parse_args_into_dataclasses()
    *models, data = smoke.glue() if ours.smoke else (ours.teacher, ours.student, load_dataset("nyu-mll/glue", "sst2"))
    teacher, student = map(AutoModelForSequenceClassification.from_pretrained, models)
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    train = data["train"].map(lambda row: tokenizer(row["sentence"], truncation=True, max_length=128))
    teacher = ModelTeacher(teacher, label_matching="by_index")  # its config need not name the labels as GLUE does
    distiller = Distiller(student, teacher, temperature=ours.temperature, alpha=ours.alpha)
    trainer = OwnTrainer(student, args, train_dataset=train, processing_class=tokenizer, distiller=distiller)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
