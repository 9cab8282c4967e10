"""stub"""

from qdist.core.errors import RunError


def require_agreement(facts, **k):
    pass


def require_same_prepared(p):
    for x in p:
        if x.error:
            raise RunError(f"{x.name}: {x.error}", try_=x.try_)
