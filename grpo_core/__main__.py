import os
import sys

from grpo_core.cli import main

code = main()
if code:  # threads of a process group that still lives can turn an ordinary end into an abort
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
