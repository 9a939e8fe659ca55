"""The shared-parameter audio-visual Transformer: pretraining from shards, and transfer."""

__version__ = "0.1.0"
