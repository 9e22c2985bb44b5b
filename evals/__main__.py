"""The harness's command line: `rotorquant COMMAND --help`, or `python -m evals` in a clone."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from rotorquant_hf import PRESETS, RotorQuantConfig

from . import commands, verify
from .caches.registry import KINDS, CacheSpec
from .calibrate import AllocateOptions, CalibrateOptions, make_allocation, make_calibration
from .errors import InputError, NotAvailableError, first_line, require
from .failures import Failure
from .lm_eval.__main__ import main as lm_eval
from .measurements.registry import MEASUREMENTS
from .options import add_arguments, from_arguments
from .places import called, clone
from .processes import Share, require_one
from .progress import clear, say
from .requirements import install, missing, packages_of, require_packages
from .subjects.models import LoadedModel, ModelOptions, load, pick_device
from .subjects.texts import TooShortError
from .sweep import plan, rows
from .sweep import runner as sweep


def run_measurement(args: argparse.Namespace) -> int:
    """Measure one cache (speed: several, side by side) on one model."""
    measurement = MEASUREMENTS[args.measurement]
    options: Any = from_arguments(measurement.options, args)
    specs = [commands.cache_of(args)]
    if measurement.together:
        specs = [CacheSpec.named(text, "--beside") for text in args.beside] + specs
    model = from_arguments(ModelOptions, args)
    require_packages(args.measurement, packages_of(model, options, *specs))
    loaded = load(model)
    results = measurement.prepare(loaded, options, args.data_seed)(specs)
    for spec, result in zip(specs, results, strict=True):
        if isinstance(result, Failure):
            raise (NotAvailableError if result.status == "not run" else InputError)(result.reason)
        commands.show({**_head(loaded), "cache": spec.label, **result}, args.json)
    return 0


def _head(loaded: LoadedModel) -> dict[str, str]:
    """What every result begins with: of which model it is."""
    return {"model": loaded.options.model, "dtype": str(loaded.dtype).removeprefix("torch.")}


def run_sweep(args: argparse.Namespace) -> int:
    """Measure every row of a plan; continue where an earlier run stopped."""
    replaced = {}
    if args.model:
        replaced["models"] = args.model
    if args.text:
        replaced["text"] = args.text
    planned = plan.read_plan(args.config, replaced)
    out = args.out or Path("results") / planned.name
    if lacking := _lacking(planned):
        print(lacking, file=sys.stderr)
    if args.dry_run:
        sweep.check_out(planned, out, sweep.versions_of(pick_device(None), args.argv))
        print(plan.summary(planned, sweep.statuses(planned, out)))
        return 0
    share = Share.of_environment()
    counts = sweep.run(planned, out, args.argv, args.retry, share)
    shown = ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "no rows"
    part = f"process {share.rank + 1} of {share.processes}: " if share.processes > 1 else ""
    print(f"{part}{shown} of {len(planned.rows)} rows; in {out / sweep.file_of(share)}")
    # A launcher ends the other processes when one of them reports a failure: so all do, in the end.
    failed = sum(each.get("failed", 0) for each in share.gather(counts))
    return 1 if failed else 0


def _lacking(planned: plan.Plan) -> str:
    """One line on the rows whose packages are missing; empty if there are none."""
    needs = [packages_of(row.model, row.options, row.cache) for row in planned.rows]
    absent = missing(dict.fromkeys(name for names in needs for name in names))
    if not absent:
        return ""
    rows = sum(not set(absent).isdisjoint(names) for names in needs)
    return (
        f"note: {rows} of {len(needs)} rows will not be run, as {', '.join(absent)} "
        f"{'is' if len(absent) == 1 else 'are'} not installed: {install(absent)}, then --retry"
    )


def run_report(args: argparse.Namespace) -> int:
    """Write the report of one or more sweeps: an HTML page, Markdown tables, CSV."""
    from .report import write

    headers, found = rows.read_results(args.results)
    first = args.results[0]
    out = args.out or (first if first.is_dir() else first.parent)
    require(not out.exists() or out.is_dir(), f"--out {out} is a file: name a folder")
    title = args.title or ", ".join(dict.fromkeys(header["name"] for header in headers))
    for path in write(found, headers, out, title):
        print(path)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Say which preset of rotorquant, or which cache with settings of your own, is safe on a model.

    It reads window after window until every verdict is clear, or the text (or --max-tokens) ends.
    Without --model, or without --text or --dataset, it is a demonstration on the model and the
    samples of this project. Exit status: 0 if a cache is safe; 1 if none of those measured is; 2
    for bad input or a missing package; 3 if there is not enough evidence; 4 if none is safe and one
    failed or lacks a package.
    """
    for old, new in verify.OLD_FLAGS.items():
        if any(argument.split("=")[0] == old for argument in args.argv):
            print(f"DeprecationWarning: {old} is now {new}", file=sys.stderr)
    own_text = "text" in args or "dataset" in args
    if not own_text and clone() is None:
        raise InputError("verify needs a text like yours: --text FILE (the samples are in a clone)")
    text = {} if own_text else {"text": (verify.SAMPLES,)}
    options = from_arguments(verify.VerifyOptions, args, **text)
    specs, model = options.caches(), from_arguments(ModelOptions, args)
    require_packages("verify", packages_of(model, options))
    if shown := verify.demonstration(model.model, "model" in args, own_text):
        print(f"{shown}\n", file=sys.stderr if args.json else sys.stdout, flush=True)
    loaded = load(model)
    head, found = _head(loaded), []
    try:
        for verdict in verify.verdicts(loaded, options):
            found.append(verdict)
            basis = f" ({verdict.basis})" if verdict.figures else ""
            say(f"{verdict.label}: {verdict.outcome}{basis}")
    except TooShortError as error:
        why = verify.too_short(error, options)
        if args.json:
            commands.show({**head, "verdict": verify.NOT_ENOUGH, "why": why}, as_json=True)
        else:
            print(f"Not enough evidence: {why}")
        return verify.STATUS[verify.NOT_ENOUGH]
    found = [verdict for spec in specs for verdict in found if verdict.spec == spec]
    if args.json:
        best = verify.recommended(found)
        for verdict in found:
            said = {"verdict": verdict.outcome, "why": verdict.why, "recommended": verdict is best}
            line = {**head, "cache": verdict.label, **said, **verdict.figures}
            commands.show(line, as_json=True)
    else:
        print(f"{verify.table(found)}\n\n{verify.conclusion(found, loaded)}")
    return verify.STATUS[verify.outcome(found)]


def run_calibrate(args: argparse.Namespace) -> int:
    """Take a model's channel statistics and query directions from some text, for its caches.

    Python: RotorQuantCache("k3v3", config=model.config, calibration="FILE"); here:
    --cache calibrated:preset=k3v3,file=FILE.
    """
    model = from_arguments(ModelOptions, args)
    options = from_arguments(CalibrateOptions, args)
    require_packages("calibrate", packages_of(model, options))
    _check_file(args.out)
    made = make_calibration(load(model), options, args.preset)
    try:
        made.save(args.out)
    except OSError as error:
        raise InputError(f"--out {args.out} cannot be written: {first_line(error)}") from error
    print(f"{args.out}: {len(made.layers)} layers, from {made.tokens:,} tokens")
    return 0


def _check_file(out: Path) -> None:
    """Refuse, before any work, a file that could not be written.

    Raises:
        InputError: naming it.
    """
    inside = out / "model.safetensors"
    require(not out.is_dir(), f"--out {out} is a folder: name a file, such as {inside}")
    require(
        out.parent.is_dir(),
        f"--out {out}: there is no folder {out.parent}; make it, or name another",
    )
    require(
        os.access(out.parent, os.W_OK), f"--out {out}: {out.parent} cannot be written; name another"
    )


def run_allocate(args: argparse.Namespace) -> int:
    """Divide the bits of a cache among a model's layers, by what errors cost there.

    Prints the settings, for Python and for --cache.
    """
    spec = CacheSpec.named(args.cache, "--cache")
    if not isinstance(spec.options, RotorQuantConfig):
        raise InputError(f"--cache {args.cache}: name a preset of rotorquant, with its settings")
    model = from_arguments(ModelOptions, args)
    options = from_arguments(AllocateOptions, args)
    require_packages("allocate", packages_of(model, options))
    loaded = load(model)
    made = make_allocation(loaded, options, spec.options)
    keys, values = (json.dumps(x, separators=(",", ":")) for x in (made.key_bits, made.value_bits))
    cache = f"{args.cache}{',' if ':' in args.cache else ':'}key_bits={keys},value_bits={values}"
    code = CacheSpec("rotorquant", made, "").code
    if args.json:
        bits = {"key_bits": made.key_bits, "value_bits": made.value_bits}
        commands.show({**_head(loaded), "cache": cache, **bits, "code": code}, as_json=True)
    else:
        print("\n".join(code))
        print(f"--cache '{cache}'")
    return 0


def run_lm_eval(args: argparse.Namespace) -> int:
    """Run lm-eval's own command line with the model `rotorquant`: it has no hook for plugins."""
    lm_eval(args.arguments)
    return 0


def list_caches(args: argparse.Namespace) -> int:
    """Print the caches that can be measured."""
    for name, kind in KINDS.items():
        print(f"{name:<12}{kind.text}")
    print(f"presets of rotorquant: {', '.join(PRESETS)}")
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["lm-eval"]:  # argparse cannot pass options on
        return lm_eval(arguments[1:])
    args = parser().parse_args(arguments)
    args.argv = arguments
    transformers_logging.disable_progress_bar()
    try:
        if args.run is not run_sweep:
            require_one(f"{called()} {arguments[0]}")
        status = args.run(args)
    except (InputError, NotAvailableError) as error:
        clear()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        goes_on = args.run is run_sweep
        more = "; the same command continues from here" if goes_on else ""
        clear()
        print(f"stopped{more}", file=sys.stderr)
        raise SystemExit(130) from None
    if status:
        raise SystemExit(status)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(prog=called(), description="Quality, memory and speed of caches.")
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str = ""
    ) -> argparse.ArgumentParser:
        text = text or run.__doc__ or ""
        added = subparsers.add_parser(name, help=text.split("\n")[0], description=text)
        added.set_defaults(run=run)
        return added

    for name, measurement in MEASUREMENTS.items():
        p = command(name, run_measurement, measurement.text)
        p.set_defaults(measurement=name)
        commands.add_model(p)
        commands.add_cache(p)
        add_arguments(p, measurement.options, "measurement")
        if measurement.together:
            p.add_argument(
                "--beside",
                nargs="*",
                default=["dynamic"],
                help="caches to compare with (default dynamic)",
            )
        p.add_argument("--data-seed", type=int, default=0, help="of random prompts (default 0)")
        p.add_argument("--json", action="store_true", help="print one line of JSON per cache")

    p = command("sweep", run_sweep)
    p.add_argument("config", type=Path, help="YAML, see configs/")
    p.add_argument("--out", type=Path, help="folder of the results (default: results/NAME)")
    p.add_argument("--model", nargs="+", help="models instead of the file's")
    p.add_argument("--text", nargs="+", help="text instead of the file's")
    p.add_argument(
        "--dry-run", action="store_true", help="print the plan and the state of its rows"
    )
    p.add_argument(
        "--retry", action="store_true", help="measure rows that failed or were not run again"
    )

    p = command("report", run_report)
    p.add_argument("results", nargs="+", type=Path, help="folders or files of sweeps")
    p.add_argument("--out", type=Path, help="folder of the report (default: the first results')")
    p.add_argument("--title", help="of the report (default: the sweeps' names)")

    p = command("verify", run_verify)
    commands.add_model(p)
    add_arguments(p, verify.VerifyOptions, "measurement")
    for old, new in verify.OLD_FLAGS.items():
        name = new.removeprefix("--").replace("-", "_")
        p.add_argument(
            old, dest=name, type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    p.add_argument("--json", action="store_true", help="print one line of JSON per cache")

    p = command("calibrate", run_calibrate)
    commands.add_model(p)
    add_arguments(p, CalibrateOptions, "text")
    p.add_argument("--preset", default="k4v4", choices=PRESETS, help="whose settings to calibrate")
    p.add_argument("--out", type=Path, required=True, help="file of the calibration")

    p = command("allocate", run_allocate)
    commands.add_model(p)
    add_arguments(p, AllocateOptions, "text")
    p.add_argument(
        "--cache", default="k3v3", metavar="NAME[:OPTION=VALUE,...]", help="what is to be divided"
    )
    p.add_argument("--json", action="store_true", help="print one line of JSON")

    p = command("lm-eval", run_lm_eval)
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="see lm-eval --help")

    command("caches", list_caches)
    return top


if __name__ == "__main__":
    main()
