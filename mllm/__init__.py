"""mllm: multimodal LLMs from parts. Importing this package loads nothing heavy; the rooms load what they need."""

from mllm.registration import announce

__version__ = "0.1.0"

announce()
