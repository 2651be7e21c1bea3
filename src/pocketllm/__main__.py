"""`python -m pocketllm`: the command line without its script on the PATH."""

from pocketllm.cli import main

main()
