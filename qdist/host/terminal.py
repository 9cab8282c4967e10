"""An error as standard error shows it: of a command, or of a process that a command started."""

import shutil
import sys

from qdist.core.errors import QdistError
from qdist.core.fitting import fitted


def error_text(error: QdistError) -> str:
    """What is wrong, and below it what to try.

    Fitted to standard error where it is a terminal; what may be copied, and a log's lines, stay as they are.
    """
    text = f"error: {error}"
    if not sys.stderr.isatty():
        return text
    width, found = shutil.get_terminal_size().columns, list[str]()
    for line in text.splitlines():
        found += [line] if line.startswith(("  | ", "  try: ")) else fitted(line, width, margin=len("error: "))
    return "\n".join(found)
