"""Every error a user can meet.

    ToolkitError
    ├── InputError          exit code 2: what the user gave us is wrong
    │   ├── ConfigError     a configuration file, key or value
    │   └── DataError       a run directory, data set or table that cannot be read
    └── RunError            exit code 1: a run that started and failed
        └── ConservationError   rows, tokens, KV blocks or GPU-seconds do not add up

A message is one line: where, what is wrong, what to do.
"""


class ToolkitError(Exception):
    exit_code = 1


class InputError(ToolkitError):
    exit_code = 2


class ConfigError(InputError):
    pass


class DataError(InputError):
    pass


class RunError(ToolkitError):
    exit_code = 1


class ConservationError(RunError):
    pass
