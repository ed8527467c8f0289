"""Keeps libraries' progress bars and advice out of our own output."""


def quieten_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
