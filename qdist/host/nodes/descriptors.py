"""May this process hold the sockets and pipes of a run of many nodes?"""

import resource

_WANTED = 65_536
"""Enough for 512 nodes of 8 ranks, each connection of which has two ends at the gate."""


def allow_descriptors() -> None:
    """Raise this process's limit of open files to what a run of many nodes needs, as far as the system lets it.

    The usual 1,024 are too few: a gate without free descriptors lets nobody in, and says nothing.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
