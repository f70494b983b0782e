"""A model that no stock class holds, as transformers runs it: `writer.py` puts the files beside its weights; the others
are these files, and what `import mllm` registers with transformers."""
