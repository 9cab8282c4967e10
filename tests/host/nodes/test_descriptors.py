"""May a process that serves many nodes hold their connections?"""

import resource
from collections.abc import Iterator

import pytest

from qdist.host.nodes.descriptors import allow_descriptors


@pytest.fixture
def hard() -> Iterator[int]:
    """The limit that cannot be raised; the other one is put back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_low_limit_of_open_files_is_raised_as_far_as_it_may_be(hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    allow_descriptors()
    most = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)


def test_a_higher_limit_stays(hard: int) -> None:
    if hard != resource.RLIM_INFINITY and hard <= 65_536:
        pytest.skip("the limit of this system is not higher")
    resource.setrlimit(resource.RLIMIT_NOFILE, (65_537, hard))
    allow_descriptors()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (65_537, hard)
