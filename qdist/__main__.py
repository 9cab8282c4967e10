"""`python -m qdist` is `qdist`."""

from qdist.cli.main import main

if __name__ == "__main__":
    main(prog_name="qdist")
