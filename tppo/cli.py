"""The one command. Imports what a subcommand needs when it runs, so that `tppo --help` never waits for torch."""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from profiling.errors import ConfigError, InputError
from profiling.shell import exit_code_of


class _Parser(argparse.ArgumentParser):
    """One line on an error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tppo`. Returns the exit code: 0, 1 for a failed run, 2 for bad input, 130 on Ctrl-C, 143 on SIGTERM."""
    own, others = split_at_dashes(list(sys.argv[1:] if argv is None else argv))
    debug = "--debug" in own
    words = [*joined_overrides([word for word in own if word != "--debug"]), *others]

    def run() -> int:
        if "--output=" in own or "" in (after for flag, after in itertools.pairwise(own) if flag == "--output"):
            raise ConfigError("--output: names nothing; an empty word would be the current directory")
        command = next((word for word in words if not word.startswith("-")), "")
        options, rest = build_parser(command).parse_known_args(words)
        if rest and not options.overrides:
            raise ConfigError(f"{rest[0]}: unknown option; see tppo {options.command} --help")
        return options.run(options, rest)

    return exit_code_of("tppo", run, debug=debug)


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before a lone `--`, and from it on: those belong to a profiled command."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place:]


def joined_overrides(words: Sequence[str]) -> list[str]:
    """`--section.key value` as `--section.key=value`, so that no value is taken for a file, wherever it stands."""
    joined, left = [], list(words)
    while left:
        word = left.pop(0)
        takes_value = word == "--algorithm" or (word.startswith("--") and "." in word and "=" not in word)
        if takes_value and left and not left[0].startswith("--"):
            word = f"{word}={left.pop(0)}"
        joined.append(word)
    return joined


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """`command`: the one that is called, where flags depend on it."""
    parser = _Parser(
        prog="tppo",
        description="Truncated PPO for reasoning models: train, profile, calibrate, simulate, draw.",
        epilog="Every subcommand takes --debug, which shows the traceback of an error.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(run=_top, overrides=False, command="")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Callable, text: str, overrides: bool = False) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(run=run, overrides=overrides)
        return own

    demo = add("demo", _demo, "train PPO and T-PPO on this machine, calibrate, predict, report")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="directory of the runs and the report")
    demo.add_argument("--seed", type=int, default=0, help="first seed")
    demo.add_argument("--seeds", type=int, default=None, help="number of seeds (3; 1 with --quick)")
    demo.add_argument("--quick", action="store_true", help="one seed")
    demo.add_argument("--regime", default="short", help="short, tail or prototype (tppo/regimes)")

    train = add("train", _train, "train; writes a run directory", overrides=True)
    train.add_argument("config", type=Path, nargs="?", help="TOML file")
    train.add_argument("--output", type=Path, help="run directory")
    train.add_argument("--resume", type=Path, metavar="DIR", help="go on from DIR's newest checkpoint; with "
                       "--output, there, and DIR stays as it is")  # fmt: skip
    train.add_argument("--ray", metavar="ADDRESS", help="rollout engines on a Ray cluster: auto, local, HOST:PORT or "
                       "ray://HOST:PORT ([ray] of CONFIG)")  # fmt: skip
    train.add_argument("--fields", action="store_true", help="print every field with its help and default")

    train.add_argument("--check", action="store_true",
                       help="only say what memory it needs, beside tppo plan; 2 where it does not fit")  # fmt: skip
    train.add_argument("--gpu", help="of --check: a bundled name or a TOML file")
    train.add_argument("--gpus", type=int, help="of --check: how many (as many as [ray] asks for, else 1)")

    evaluation = add("eval", _eval, "avg@k, pass@k and maj@k of a run or a model, with intervals; --section.key value "
                     "overrides", overrides=True)  # fmt: skip
    if command == "eval":
        from tppo.commands.eval import add_flags as add_evaluation_flags

        add_evaluation_flags(evaluation)

    profile = add("profile", _profile, "run any command under the sampler")
    profile.add_argument("--interval", type=float, default=0.1, help="seconds between samples")
    profile.add_argument("--output", type=Path, default=Path("runs/profile"), help="run directory")
    profile.add_argument("--adapter", action="append", default=[], metavar="NAME",
                         help="read phases from verl, openrlhf or nvtx; repeat")  # fmt: skip
    profile.add_argument("--links", action="store_true", help="also sample PCIe and NVLink traffic")
    profile.add_argument("--pid", type=int, help="sample beside a process that runs already, until it ends")
    profile.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")

    samples = add("samples", _samples, "show what the policy wrote in a step")
    samples.add_argument("run_directory", type=Path, metavar="RUN")
    samples.add_argument("--step", type=int, help="of which step (default: the last that has samples)")
    samples.add_argument("--json", action="store_true", help="print whole texts as JSON")

    watch = add("watch", _watch, "show a run as it goes on: phases, devices, idle causes, alarms")
    watch.add_argument("run_directory", type=Path, metavar="RUN")
    watch.add_argument("--once", action="store_true", help="print the run so far and exit")
    watch.add_argument("--prometheus", type=int, metavar="PORT", help="also serve /metrics at this port")
    watch.add_argument("--bind", default="127.0.0.1", help="address of --prometheus (only this machine)")
    watch.add_argument("--host", action="append", default=[], metavar="NAME",
                       help="a name under which --prometheus is asked, besides addresses; repeat")  # fmt: skip

    calibrate = add("calibrate", _calibrate, "fit a cost model to one or more runs; print the quality of the fit")
    calibrate.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or verl:LOG, or trl:LOG")
    calibrate.add_argument(
        "--output", type=Path, help="calibration file (default: calibration.json in the first RUN; of logs, here)"
    )
    calibrate.add_argument("--json", action="store_true", help="print the calibration as JSON")
    calibrate.add_argument("--engines", type=int, default=1, help="of a log: rollout engines (1)")
    calibrate.add_argument("--rows-per-step", type=int, help="of a log that does not tell: responses of a step")
    calibrate.add_argument("--transfer", type=Path, metavar="FILE", help="also write efficiency factors (TOML) that "
                           "costs of another model or GPU can use; needs --model and --gpu of the RUN")  # fmt: skip
    calibrate.add_argument("--model", help="of the RUN: a bundled name or a config.json")
    calibrate.add_argument("--gpu", help="of the RUN: a bundled name or a TOML file")
    calibrate.add_argument(
        "--tensor-parallel", type=int, help="GPUs of each of the RUN's engines (as its header says)"
    )
    calibrate.add_argument("--trainer-gpus", type=int, help="GPUs that trained in the RUN (as its header says)")
    calibrate.add_argument("--engine", default="vllm", help="whose factors to start from: vllm, sglang, trtllm")

    simulate = add("simulate", _simulate, "simulate an experiment; --section.key value overrides", overrides=True)
    simulate.add_argument("experiment", type=Path, help="TOML file")
    simulate.add_argument("--output", type=Path, help="write a run directory")
    simulate.add_argument("--json", action="store_true", help="print the summary as JSON")

    plan = add("plan", _plan, "before buying: hours, money, energy and idle time of every way to run a training")
    if command == "plan":  # its flags are the fields of a question: reading them takes a second
        from tppo.commands.plan import add_flags

        add_flags(plan)
    plan.add_argument("--json", action="store_true", help="print the answer as JSON")
    plan.add_argument("--output", type=Path, help="write the answer as JSON")

    explore = add("explore", _explore, "the planner as a page in your browser, on this machine only")
    explore.add_argument("--port", type=int, default=0, help="0: a free one (0)")
    explore.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="another than this machine's own "
                         "needs a token, which is in the address that is printed")  # fmt: skip
    explore.add_argument("--open", action="store_true", help="open it in a browser")

    sweep = add("sweep", _sweep, "simulate every combination of some fields' values, in parallel", overrides=True)
    sweep.add_argument("experiment", type=Path, help="TOML file")
    sweep.add_argument(
        "--vary", action="append", default=[], metavar="SECTION.KEY=VALUE,VALUE", help="a field and its values; repeat"
    )
    sweep.add_argument("--output", type=Path, default=Path("runs/sweep"), help="directory; goes on with what is there")
    sweep.add_argument("--jobs", type=int, help="processes on this machine (default: its cores)")
    sweep.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster instead; auto: the one on this machine")
    sweep.add_argument("--json", action="store_true", help="print the table as JSON")

    plot = add("plot", _plot, "draw a figure of one or more runs")
    plot.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    plot.add_argument("--figure", metavar="NAME", help="of --list; all: every one that the runs allow")
    plot.add_argument("--list", action="store_true", help="name every figure and what it shows")
    plot.add_argument("--format", default="png", help="png, pdf, svg; several with commas")
    plot.add_argument("--style", default="screen", help="screen, or paper: a column wide, fonts embedded")
    plot.add_argument("--output", type=Path, default=Path("figures"), help="directory")

    export = add("export", _export, "write a run for Perfetto (chrome), TensorBoard, as tables, or its models")
    export.add_argument("run_directory", type=Path, metavar="RUN")
    export.add_argument("--format", default="chrome", help="chrome, csv, huggingface, parquet, tensorboard or wandb")
    export.add_argument("--checkpoint", metavar="NAME", help="of huggingface: step-000100, best or last (last)")
    export.add_argument(
        "--steps", default="0:", metavar="FIRST:LAST", help="only these steps, of chrome (default: all)"
    )
    export.add_argument("--output", type=Path, help="file (chrome: trace.json) or directory (named as the format)")

    paper = add("paper", _paper, "the figures of the T-PPO paper's manner, from simulations and the demo's runs")
    paper.add_argument("--output", type=Path, default=Path("runs/paper"), help="directory; goes on with what is there")
    paper.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="runs of `tppo demo`, for what is measured"
    )
    paper.add_argument("--train", action="store_true", help="run the demo first, where it is not finished")
    paper.add_argument("--settings", type=Path, help="TOML file (default: tppo.paper's figures.toml)")
    paper.add_argument("--jobs", type=int, help="simulations at a time (default: this machine's cores)")

    report = add("report", _report, "write one self-contained report.html about one or more runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    report.add_argument("--output", type=Path, default=Path("report.html"))

    compare = add("compare", _compare, "what differs between two runs, and whether it exceeds the noise")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                         help="RUN_A RUN_B; with --against, the seeds of the first arm")  # fmt: skip
    compare.add_argument("--against", type=Path, nargs="+", metavar="RUN", help="the seeds of the second arm")
    compare.add_argument("--target", type=float, default=0.85, help="score whose time is compared")
    compare.add_argument("--block", type=int, help="steps that are resampled together (default: by autocorrelation)")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return parser


def _top(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.version:
        from importlib.metadata import version

        print(version("tppo"))
        return 0
    build_parser().print_help()
    return 0 if not rest else 2


def _demo(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.demo import run_demo

    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    if options.seed < 0 or seeds < 1:
        raise InputError(f"tppo demo: --seed {options.seed}, --seeds {seeds}: need a seed of at least 0 and one run")
    run_demo(options.output, regime=options.regime, seeds=range(options.seed, options.seed + seeds))
    return 0


def _train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.train import check_training, print_fields, run_training

    if options.fields:
        print_fields()
        return 0
    if options.check:
        check_training(
            options.config, rest, output=options.output, resume=options.resume, ray=options.ray, gpu=options.gpu,
            gpus=options.gpus,
        )  # fmt: skip
        return 0
    for flag, given in (("--gpu", options.gpu), ("--gpus", options.gpus)):
        if given is not None:
            raise ConfigError(f"{flag} {given}: belongs to --check; add it, or leave {flag} out")
    return run_training(options.config, rest, output=options.output, resume=options.resume, ray=options.ray)


def _eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.eval import run_eval

    run_eval(options, rest)
    return 0


def _profile(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from profiling.command import profile_command, profile_process
    from tppo.adapters.autoload import environment

    words = options.words[1:] if options.words[:1] == ["--"] else options.words
    if options.pid is not None:
        if words or options.adapter:
            raise InputError("tppo profile: either --pid or a command (and only a command has adapters)")
        return profile_process(options.pid, interval_s=options.interval, output=options.output, links=options.links)
    if not words:
        raise InputError("tppo profile: no command; write tppo profile -- COMMAND ..., or --pid PID")
    return profile_command(
        words, interval_s=options.interval, output=options.output, links=options.links,
        environment=environment(options.adapter, os.environ),
    )  # fmt: skip


def _samples(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.samples import run_samples

    run_samples(options.run_directory, step=options.step, as_json=options.json)
    return 0


def _watch(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from profiling.watch import watch

    watch(options.run_directory, once=options.once, port=options.prometheus, host=options.bind,
          names=options.host)  # fmt: skip
    return 0


def _calibrate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.calibrate import Target, run_calibration

    target = None
    if options.transfer is not None:
        if options.model is None or options.gpu is None:
            raise InputError("tppo calibrate: --transfer needs --model and --gpu, those of the RUN")
        target = Target(options.transfer, options.model, options.gpu, options.tensor_parallel, options.trainer_gpus,
                        options.engine)  # fmt: skip
    run_calibration(
        options.runs, options.output, as_json=options.json, engines=options.engines,
        rows_per_step=options.rows_per_step, target=target,
    )  # fmt: skip
    return 0


def _simulate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.simulate import run_simulation

    run_simulation(options.experiment, rest, output=options.output, as_json=options.json)
    return 0


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.plan import run_plan

    run_plan(options)
    return 0


def _explore(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.explore import run_explore

    run_explore(port=options.port, bind=options.bind, open_browser=options.open)
    return 0


def _sweep(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.sweep import run_sweep

    return run_sweep(
        options.experiment, rest, options.vary, output=options.output, jobs=options.jobs, ray=options.ray,
        as_json=options.json,
    )  # fmt: skip


def _plot(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from analysis import plot
    from profiling.reader import Run

    if options.list:
        print("\n".join(plot.listed()))
        return 0
    if not options.runs or options.figure is None:
        raise InputError("tppo plot: needs a RUN and --figure NAME; `tppo plot --list` names the figures")
    runs = [Run(path) for path in options.runs]
    formats = [name.strip() for name in options.format.split(",")]
    left_out: dict[str, str] = {}
    if options.figure == plot.ALL:
        written, left_out = plot.plot_all(runs, formats, options.output, look=options.style)
    else:
        written = plot.plot(runs, options.figure, formats, options.output, look=options.style)
    for path in written:
        print(path)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return 0


def _export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.export import run_export

    if options.format == "huggingface":
        from tppo.quiet import quieten_libraries

        quieten_libraries()
    target = run_export(
        options.run_directory, form=options.format, steps=options.steps, output=options.output,
        checkpoint=options.checkpoint,
    )  # fmt: skip
    print(target)
    return 0


def _paper(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.paper import run_paper
    from tppo.paper import SETTINGS

    settings = options.settings or SETTINGS
    print(run_paper(options.output, demo=options.demo, settings_file=settings, jobs=options.jobs, train=options.train))
    return 0


def _report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.report import run_report

    print(run_report(options.runs, options.output))
    return 0


def _compare(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from tppo.commands.compare import run_compare

    run_compare(options.runs, options.against, as_json=options.json, block=options.block, target=options.target)
    return 0
