"""The entry point of `python -m grpo_core` and of the command `grpo_core`."""

import os
import sys


def run() -> None:
    """Run the command line, and exit with its code."""
    try:
        from grpo_core.cli import main

        code = main()
    except ModuleNotFoundError as error:  # this Python has grpo_core but lacks a dependency
        if (error.name or "").startswith("grpo_core"):
            raise
        print(
            f"grpo_core: {error.name} is not installed for {sys.executable}; "
            "install the dependencies with `pip install -e .` or `bash launch.sh` in a clone of the repository, "
            "or without a clone with `pip install` and the file of the wheel",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:  # while the first modules are imported
        print("grpo_core: SIGINT received before the command has started", file=sys.stderr)
        code = 130
    if code:  # at a normal exit, threads of a process group that is still open can abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    run()
