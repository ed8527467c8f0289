"""Rollout engines on a Ray cluster: `tppo train CONFIG.toml --ray ADDRESS`.

The trainer is this process, Ray's driver; every engine is an actor (worker.py) in a place that was reserved for it
(places.py). EnginePool (pool.py) speaks the protocol of one engine for all of them, so schedules, trainer and
checkpoints know nothing of Ray. Of several ranks, which torchrun or the cluster itself has started (launch.py), the
first is the driver and has the pool; all of them see LedEngines (led.py). Ray is imported only when a run asks for a
cluster, and by the first rank alone.
"""
