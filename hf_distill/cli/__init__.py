"""The command line, `hf-distill`, which only calls the library."""
