import os
import sys


def run() -> None:
    """`python -m grpo_core`, and the command grpo_core."""
    try:
        from grpo_core.cli import main

        code = main()
    except ModuleNotFoundError as error:  # a Python that holds this package and not what it needs
        if (error.name or "").startswith("grpo_core"):
            raise
        why = f"grpo_core: {error.name} is not installed for {sys.executable}"
        print(
            f"{why}; pip install -e . installs what is missing, and bash launch.sh does it by itself", file=sys.stderr
        )
        code = 2
    if code:  # threads of a process group that still lives can turn an ordinary end into an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    run()
