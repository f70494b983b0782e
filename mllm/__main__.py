"""`python -m mllm`: the command, where its script is not on the path."""

from mllm.cli import main

if __name__ == "__main__":
    main()
