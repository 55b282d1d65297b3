"""Reading models: their blocks, the activations that these compute, real positions, output heads and generation."""
