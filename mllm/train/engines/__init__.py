"""Engines behind `engine`: DeepSpeed's ZeRO, torch's FSDP2, and whole tensors from the shards of either."""
