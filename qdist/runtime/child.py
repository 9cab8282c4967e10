"""Runs another module of qdist as a program: `python -m qdist.runtime.child MODULE ...`. Ctrl-C leaves no traceback."""

import runpy
import sys


def main() -> None:
    """With what follows the module's name as its arguments."""
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
