"""Pretraining: batch -> losses, held-out figures, the report."""
