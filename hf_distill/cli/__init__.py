"""The command line: `hf-distill`. Owns no logic of distillation; it only calls the library."""
