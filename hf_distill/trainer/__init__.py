"""The parts of the trainer, one idea a file; the public classes are in `hf_distill.trainer.mixin`."""
