"""Commands as they are printed: pasted into a shell they mean what they were printed for, whatever a path is called."""

import shlex


def command(*words: object) -> str:
    """A command of qdist. words: those behind `qdist`; each is quoted where a shell would take it apart."""
    return quoted("qdist", *words)


def quoted(*words: object) -> str:
    """Words of a command, such as `--model 'my models/one'`."""
    return shlex.join(argument(word) if hasattr(word, "__fspath__") else str(word) for word in words)


def argument(path: object) -> str:
    """A path as an argument of a program, which would take one that begins with a dash for a flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def resuming(run: object, *settings: object) -> str:
    """The command that goes on with a run. settings: `--set` and others, words of their own."""
    return command("launch", "--resume", "--run", argument(run), *settings)
