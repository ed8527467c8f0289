"""The trainer and the command `tppo`."""
