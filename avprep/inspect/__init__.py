"""What looks at finished shards."""
