"""Does any of a few hundred odd requests make the server fail?"""

import asyncio

from bench.fuzz_server import in_process


def test_odd_requests_are_answered_or_refused_with_a_reason() -> None:
    statuses, bad = asyncio.run(in_process(300, seed=1))
    assert bad == []
    assert statuses[200] > 10
    assert statuses[400] > 100
