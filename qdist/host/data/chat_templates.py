"""Finds the chat template that a user names: one of those known by name, or a Jinja file."""

from pathlib import Path

from qdist.core.data.templates import TEMPLATES, NamedTemplate
from qdist.core.errors import SpecError, nearest
from qdist.host.opening import read_text

_MOST_BYTES = 1 << 20


def find_template(named: str) -> NamedTemplate:
    """The template called so, else the file. Raises SpecError if it is neither."""
    if named in TEMPLATES:
        return TEMPLATES[named]
    path = Path(named).expanduser()
    if not path.is_file():
        known, close = ", ".join(sorted(TEMPLATES)), nearest(named, TEMPLATES)
        raise SpecError(
            f"data.template={named} is neither a template known by name nor a file",
            try_=f"--set data.template={close}" if close else f"a Jinja file, or one of {known}",
        )
    if path.stat().st_size > _MOST_BYTES:
        raise SpecError(f"{path} has {path.stat().st_size:,} bytes, and is no chat template", try_="a Jinja file")
    return NamedTemplate(path.name, read_text(path, SpecError), complete=True)
