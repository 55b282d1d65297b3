"""Data as people have them: recordings, columns and labels of a dataset, read before the models see them."""
