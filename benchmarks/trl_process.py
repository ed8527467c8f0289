"""TRL's PPO trainer in a process and an environment of its own (trl_peer.py), seen from ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

TRL_VERSION = "1.12.0"


def environment(directory: Path) -> Path:
    """The Python of an environment with TRL, made if it is not there."""
    python, marker = directory / "bin" / "python", directory / ".installed"
    own = f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"
    packages = [*own, f"trl=={TRL_VERSION}", "datasets"]
    if not marker.exists() or marker.read_text().split() != packages:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        for some in (packages[:1], packages):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *some], check=True)
        marker.write_text("\n".join(packages) + "\n")
    return python


class Peer:
    """TRL's trainer in a process of its own; a step for every command."""

    def __init__(self, python: Path, settings: dict[str, Any], directory: Path) -> None:
        path, self.log = directory / "peer.json", directory / "peer.log"
        path.write_text(json.dumps(settings))
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, Path(__file__).with_name("trl_peer.py"), path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environ,
            )  # fmt: skip

    def step(self, command: str = "step") -> dict[str, Any]:
        """What trl_peer.py answers: seconds of the step and of its phases, tokens, threads."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"TRL ended: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
