"""`python -m qdist` is `qdist`."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):
    # `-m` puts the working directory first, which may be a model's, with a torch.py in it.
    del sys.path[0]

from qdist.cli.main import main

if __name__ == "__main__":
    main(prog_name="qdist")
