"""What the trainer is made of, one idea a file; the public class stands in `hf_distill.trainer.mixin`."""
