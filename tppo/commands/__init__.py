"""What the subcommands of `tppo` do. With cli.py the only code that may join trainer, simulator and figures."""
