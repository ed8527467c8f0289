"""One training run on several ranks: `torchrun --nproc-per-node 8 -m tppo train CONFIG.toml`.

Every rank holds all rows of a step and the same schedule, and computes the same small tables of them; the models are
sharded (FSDP2), passes and rollouts are shared out. So a run of n ranks trains on the same rows in the same
mini-batches as a run of one. The first rank writes the run directory, and all ranks write its checkpoints.
"""
