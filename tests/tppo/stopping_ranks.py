"""One of two ranks; an advantage of the second one is not a number. Run by test_evidence.py under torchrun's
variables; prints the error."""

import sys
from pathlib import Path

import tppo.learner.policy_update as policy_update
from profiling.errors import RunError
from profiling.settings import load_settings
from tppo.config import RunConfig
from tppo.start import trainer_for


def main(config: Path) -> None:
    with trainer_for(load_settings(config, RunConfig)) as trainer:
        if trainer.ranks.rank == 1:
            objective = policy_update._objective

            def broken(*arguments):
                arguments[1].advantages[0] = float("nan")
                return objective(*arguments)

            policy_update._objective = broken
        try:
            trainer.run(show_progress=False)
        except RunError as error:
            print(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
