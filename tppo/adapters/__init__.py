"""Phases of other trainers, for `tppo profile -- COMMAND`."""
