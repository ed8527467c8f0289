"""Keeps libraries' progress bars and advice out of our own output."""

import logging
import os


def quieten_libraries() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # retries; what fails in the end is raised

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
