"""What lies between a model's inputs and its predictions: its blocks, and reading what they compute. No losses here."""
