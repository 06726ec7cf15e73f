"""python -m benchmarks run | report | compare | dispatch"""

import argparse
import os
import sys
from pathlib import Path

from . import compare, contestant, dispatch, report, result_file, suite, timing


def main(arguments=None):
    options = _parser().parse_args(arguments)
    return options.command(options)


def run(options):
    import torch

    from . import runner

    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: no CUDA device is available to torch")
        return 1
    threads = _threads(options)
    suites = [options.suite] if options.suite else suite.SUITES
    chosen = list(
        suite.cases(suites, words=options.filter, device=options.device, threads=threads, quick=options.quick)
    )
    if not chosen:
        print("no benchmark matches; suites: " + "; ".join(f"{s}: {', '.join(suite.find(s))}" for s in suite.SUITES))
        return 1
    before = result_file.load(options.out) if options.append and options.out and Path(options.out).exists() else None

    def save(result):
        if options.out:
            result_file.save(runner.merge(before, result) if before else result, options.out)

    def on_case(result, rows):
        """Write the file after every case: a long run that is broken off is not lost."""
        save(result)
        if not options.quick:
            print(f"{rows[0]['op']} {result_file.setting(rows[0])}")
            print(report.aligned(*report.row_table(rows)), end="\n\n", flush=True)

    if options.quick:
        print(f"imagegen against eager PyTorch, {result_file.threads(threads[0])}: verified, then timed", flush=True)
    result = runner.run(
        chosen,
        on_case,
        device=options.device,
        threads=threads,
        seconds=options.seconds or (0.2 if options.quick else 0.5),
        rounds=options.rounds,
        hush=options.hush,
        skip=_skipped(options),
        layouts=options.layouts,
        memory_of=() if options.no_memory or options.quick else options.memory or _every_provider(),
    )
    rows = result["rows"]
    save(result)
    if options.quick:
        print(report.quick_table(rows))
    else:
        print(report.aligned(*report.summary_table(rows)), report.losses(rows), sep="\n")
    return 0


def write_reports(options):
    for file in options.files:
        for written in report.write(file, Path(options.out or Path(file).parent)):
            print(written)
    return 0


def compare_files(options):
    print(compare.compare(result_file.load(options.a), result_file.load(options.b)))
    return 0


def write_dispatch(options):
    """Rewrites the whole table: every file it is to rest on has to be named."""
    dispatch.TABLE.write_text(dispatch.source(dispatch.fastest([result_file.load(file) for file in options.files])))
    print(dispatch.TABLE)
    return 0


def _threads(options):
    if options.device == "cuda":
        return [1]
    if options.threads:
        return [int(n) for n in options.threads.split(",")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [1] if options.quick else [1, 2][:cores]


def _skipped(options):
    if options.quick:
        return [name for name in _every_provider() if name not in ("imagegen", "eager")]
    return options.skip + ["compile"] * options.no_compile


def _every_provider():
    own = {name for s in suite.SUITES for op in suite.find(s) for name in suite.load(s, op).PROVIDERS}
    return sorted(own | {"compile", *contestant.BACKENDS})


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Verify, then time.")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("run", help="measure")
    command.set_defaults(command=run)
    command.add_argument("--suite", choices=suite.SUITES, help="default: all")
    command.add_argument(
        "--filter", type=str.split, default=[], help='words that the description has, as in "group_norm bfloat16"'
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--threads", help="a number or several, 1,2; default: 1, then 2 where there are 2 cores")
    command.add_argument("--out", help="write a JSON file")
    command.add_argument("--append", action="store_true", help="keep what else the file has: a run in pieces")
    command.add_argument("--seconds", type=float, help="time spent on one row (default 0.5; quick 0.2)")
    command.add_argument("--rounds", type=int, default=timing.MIN_ROUNDS, help="calls of each provider at least")
    command.add_argument(
        "--hush",
        metavar="COMMAND",
        help="what keeps this machine quiet while it runs: it is started before every timing, awaited until it writes "
        "a line, and ends when its input does",
    )
    command.add_argument(
        "--skip", type=lambda names: names.split(","), default=[], help="providers to leave out: compile,fold"
    )
    command.add_argument("--layouts", type=str.split, default=list(suite.LAYOUTS), help="nchw or channels_last alone")
    command.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    command.add_argument(
        "--memory", type=lambda names: names.split(","), help="whose peak memory: imagegen,eager; default: all"
    )
    command.add_argument(
        "--no-memory", action="store_true", help="leave out the peak memory, which takes a process per row"
    )
    command.add_argument("--quick", action="store_true", help="small shapes, float32, imagegen and eager only")

    command = commands.add_parser("report", help="Markdown and PNG beside each file")
    command.set_defaults(command=write_reports)
    command.add_argument("files", nargs="+", metavar="FILE.json")
    command.add_argument("--out", help="folder to write to")

    command = commands.add_parser("compare", help="what changed between two results")
    command.set_defaults(command=compare_files)
    command.add_argument("a", metavar="A.json")
    command.add_argument("b", metavar="B.json")

    command = commands.add_parser("dispatch", help="let GPU results decide which backend runs where: writes a table")
    command.set_defaults(command=write_dispatch)
    command.add_argument("files", nargs="+", metavar="FILE.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
