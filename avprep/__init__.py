"""Raw videos to WebDataset shards of 30-s clips with log-mel spectrograms."""

__version__ = "0.2.0"
