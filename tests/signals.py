"""For `preexec_fn`: what a test starts hears the signals that whoever runs the tests may ignore."""

import signal


def hears_signals() -> None:
    """A shell's background jobs ignore Ctrl-C, and what `nohup` starts a hangup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
