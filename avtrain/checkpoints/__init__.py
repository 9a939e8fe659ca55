"""Checkpoints: ours, the authors', and programs for export."""
