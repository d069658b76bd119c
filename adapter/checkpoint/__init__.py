"""Files of weights: safetensors as they are published, shards as `shard` writes them, digests."""
