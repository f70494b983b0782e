"""Beside index and plan: sources that cannot be indexed are read, packed and batched as they come."""
