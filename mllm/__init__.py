"""mllm: multimodal LLMs from parts. Importing this package loads nothing heavy; the rooms load what they need."""

__version__ = "0.1.0"
