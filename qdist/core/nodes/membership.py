"""Which nodes of a run may go on by themselves after a failure."""

from collections.abc import Collection, Sequence

from qdist.core.text import counted


def why_waiting(there: Collection[int], before: Sequence[int], least: int) -> str:
    """Why the nodes that see each other may not go on; empty if they may.

    They have to be `least`, and more than half of the generation before, or exactly half of it with its first node:
    of a run whose network fell in two, one part at most goes on.

    there: numbers of the nodes that see each other. before: those of the generation before, its first node first;
    empty for a run that begins.
    """
    if len(there) < least:
        return f"{counted(len(there), 'node')} of {least} that the run needs {_are(there)} there"
    left = [node for node in before if node in there]
    if 2 * len(left) > len(before) or (2 * len(left) == len(before) and (not before or before[0] in there)):
        return ""
    whole = f"{len(left)} of the {counted(len(before), 'node')} that worked last {_are(left)} there"
    return f"{whole}, and the others may be at work where these cannot see them"


def _are(nodes: Collection[int]) -> str:
    return "is" if len(nodes) == 1 else "are"
