import os
import sys

from grpo_core.cli import main


def run() -> None:
    """`python -m grpo_core`, and the command grpo_core."""
    code = main()
    if code:  # threads of a process group that still lives can turn an ordinary end into an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    run()
