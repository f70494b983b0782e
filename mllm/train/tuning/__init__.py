"""Rooms behind `trainable`: adapters, scales of rates, gradient checkpointing."""
