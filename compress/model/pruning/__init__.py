"""Structured pruning: importances from activations, width and depth trimming, recovery by distillation."""
