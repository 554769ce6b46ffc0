"""Activity of molecules in assays that were not seen in training."""
