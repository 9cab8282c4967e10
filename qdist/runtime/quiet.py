"""Keeps what libraries print for their own developers away from what a user reads."""


def quiet() -> None:
    """No progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
