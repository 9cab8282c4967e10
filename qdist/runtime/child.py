"""Runs another module of qdist as a program: `python -m qdist.runtime.child MODULE ...`.

What the user can put right is said in two lines, and its exit code handed on; Ctrl-C leaves no traceback.
"""

import runpy
import sys

from qdist.core.errors import QdistError
from qdist.host.children import hear_ctrl_c
from qdist.host.files import told_of_disks
from qdist.host.terminal import error_text, guard_output, say


def main() -> None:
    """With what follows the module's name as its arguments."""
    del sys.argv[0]
    guard_output()
    try:
        hear_ctrl_c()
        with told_of_disks():
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except QdistError as error:
        say(error_text(error), err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    main()
