"""Greedy answers of one conversation, with what was computed for its earlier turns kept."""
