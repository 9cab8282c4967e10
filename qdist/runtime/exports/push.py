"""Checks that an adapter or a merged model is intact, brings its card up to date, and uploads it."""

from pathlib import Path

from qdist.core.requests import Push
from qdist.core.text import counted, first_few, format_bytes
from qdist.host.hub.card import base_id, write_card
from qdist.host.hub.push import Upload, files_to_push, folder_of, push, require_card
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say
from qdist.runtime.formats.recorded_sums import require_adapter, verify_folder


def run(request: Push) -> None:
    """Upload, and print the address."""
    folder, own = folder_of(request.run, request.what), RunDir(request.run)
    if own.exists() and folder == own.adapter:
        write_card(own, folder)  # with what was evaluated since
    upload = files_to_push(folder)
    require_card(upload)
    _require_intact(upload)
    size = sum((folder / name).stat().st_size for name in upload.files)
    say(f"{folder}: {counted(len(upload.files), 'file')}, {format_bytes(size)}", err=True)
    if upload.left_out:
        say(f"note     left out: {first_few(upload.left_out)}", err=True)
    base = base_id(own.plan()) if own.exists() else ""
    say(push(upload, request.repo, private=request.private, revision=request.revision, base=base))


def _require_intact(upload: Upload) -> None:
    """Raise RunError or ModelError if tensors are not those that were written."""
    folder: Path = upload.folder
    if upload.is_adapter:
        require_adapter(folder)
    else:
        verify_folder(folder)
