"""Compare the experiments over several seeds; run what is missing first.

    python compare.py                                             report the runs that are there
    python compare.py --seeds 0 1 2                               first run what is missing of the eight scripts
    python compare.py --seeds 0 1 2 --experiments train train_x   only these two; train_x.py is compared with train.py
    python compare.py --seeds 0 1 --experiments train_x -- --lr 1e-3    with flags of the script's own

Each run is the command that a user would type, with the output folder OUT/seed0, OUT/seed1 and so on; runs in OUT
itself count too. A stopped run is resumed, a finished one is not repeated, and one that fails is reported at the end.
Writes OUT/RESULTS.md, OUT/RESULTS.html with links to the reports of the runs, and comparison.png, classes.png and
curves.png in OUT/plots.
"""

import dataclasses
import math
import statistics
import subprocess
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup

from seg import cli, files, html, plotting, signals
from seg.files import ROOT
from seg.run import Run
from util import UserError, baseline_name

# Each experiment: the one it is compared with, and its published IoU (one run, VOC2007, metric unknown), if any.
EXPERIMENTS = {
    "train": (None, 0.055),
    "train_4_a": ("train", 0.0613),
    "train_4_b": ("train_4_a", 0.0639),
    "train_4_c": ("train_4_b", 0.068),
    "train_5_a": ("train", 0.0765),
    "train_5_b": ("train", 0.15),
    "train_5_c": ("train", 0.087),
    "train_6": ("train_5_b", None),
}

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last is used for more, and is then too large.
T_QUANTILES = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
MIN_SEEDS = 3  # fewer seeds give no useful interval

RESULTS = "Mean ± standard deviation over the seeds, at full resolution, void excluded; val selects the best epoch."

DIFFERENCES = f"""\
Differences are paired by seed. From {MIN_SEEDS} seeds on, the 95 % interval is that of the paired t-test over seeds; a
difference is clear if it excludes 0. It is about the randomness of training, not the choice of photos; with no
real difference, about one interval in 20 excludes 0 all the same. The classes are the three that change most."""

CHANGED = """\
The code of these runs has changed since, or they have other image ids or masks than most. To repeat one, call its
script with the same flags, also --seed and --out, and with --overwrite."""


def finished_runs(out, warn=False):
    """The finished runs below a folder, a list of Run; one that was continued and is not at its end is left out.

    So are files that no run of this version has written, which ``warn`` prints.
    """
    folders = [folder for folder in sorted(out.glob("seed*")) if folder.name.removeprefix("seed").isdecimal()]
    runs = []
    for path in [path for folder in (*folders, out) for path in sorted((folder / "results").glob("*_seed*.json"))]:
        try:
            runs.append(Run.read(path))
        except UserError as error:
            if warn:
                print(f"warning: {error}: it is left out", file=sys.stderr)
    return [run for run in runs if len(run.history) == run.metrics["epochs"]]


def matches(run, args, dataset):
    """Whether a run is what the flags ask for, on ``dataset``. A flag not given means the experiment's default."""
    shared = {name: value for name in ("epochs", "batch_size", "limit") if (value := getattr(args, name)) is not None}
    try:
        wanted = vars(cli.add_flags(cli.Parser(None), run.metrics["defaults"]).parse_args(args.own))
    except UserError:  # its script has no such flag
        return False
    wanted |= {"limit": None} | shared
    return (run.metrics["dataset"], run.metrics["flags"]) == (dataset, wanted)


def collect(args):
    """The finished runs to report, of one data set and limit: a dict from experiment to a dict from seed to Run.

    Those of an experiment have one setting: that of the flags or, if there are no flags and no such run, its first's.
    """
    runs = finished_runs(args.out, warn=True)
    names = [Path(path).name for path in args.experiments or ()]
    order = [variant for name in names for variant in (name, f"{name}_no_pretrained")]
    runs = [run for run in runs if run.name in order or not names]
    no_flags = not (args.seeds or args.own) and args.limit is args.epochs is args.batch_size is None
    datasets = {run.metrics["dataset"] for run in runs}
    dataset = datasets.pop() if no_flags and len(datasets) == 1 else Path(args.data).resolve().name
    found = [run for run in runs if matches(run, args, dataset)]
    if no_flags:
        others = [run for run in runs if run.metrics["dataset"] == dataset]
        limits = {run.metrics["flags"]["limit"] for run in found or others}
        found += [run for run in others if {run.metrics["flags"]["limit"]} == limits]
    experiments = {}
    for run in found:
        if (run.splits, run.classes) != (found[0].splits, found[0].classes):
            problem = f"{run.json}: differs from {found[0].json} in the names of the classes or the splits"
            raise UserError(f"{problem}: repeat one of the runs with --overwrite, or compare with another --out")
        seeds = experiments.setdefault(run.name, {run.seed: run})
        if run.metrics["flags"] == next(iter(seeds.values())).metrics["flags"]:
            seeds.setdefault(run.seed, run)
    for name in names:
        if experiments and not experiments.keys() & {name, f"{name}_no_pretrained"}:
            print(f"warning: {args.out} has no comparable run of {name}: it is left out", file=sys.stderr)
    return {name: experiments[name] for name in (*order, *EXPERIMENTS, *sorted(experiments)) if name in experiments}


def command(args, script, seed):
    """The command line of a run: the script's name and its flags, as a list of str."""
    flags = {"--data": args.data, "--seed": seed, "--device": args.device, "--out": args.out / f"seed{seed}"}
    flags |= {"--epochs": args.epochs, "--batch-size": args.batch_size, "--limit": args.limit}
    line = [script, "--resume", *(str(part) for item in flags.items() if item[1] is not None for part in item)]
    has_flag = "args.pretrained" in (ROOT / script).read_text(encoding="utf-8")
    return line + args.own + ["--compile"] * args.compile + ["--no-pretrained"] * (has_flag and not args.pretrained)


def run_missing(args):
    """Run what is missing; return a list of messages about runs that failed."""
    failures, dataset = [], Path(args.data).resolve().name
    runs = [run for run in finished_runs(args.out) if matches(run, args, dataset)]
    # a run without a report was stopped while it drew, and is resumed if its last checkpoint is there
    done = {(run.name, run.seed) for run in runs if run.report.exists() or not run.last.exists()}
    for seed in args.seeds:
        for name in args.experiments or EXPERIMENTS:
            line = command(args, f"{name}.py", seed)
            experiment = Path(name).name + ("_no_pretrained" if "--no-pretrained" in line else "")
            if (experiment, seed) in done:
                print(f"{name} seed {seed}: already done", flush=True)
                continue
            print(f"\n$ python {files.command_line(line)}", flush=True)
            process = subprocess.Popen([sys.executable, str(ROOT / line[0]), *line[1:]])
            signals.wait(process)
            if process.returncode:
                failures.append(f"python {files.command_line(line)} ended with exit code {process.returncode}")
    return failures


def mean_and_interval(differences):
    """The mean of differences between seeds, and its 95 % interval (paired t-test), None for fewer than MIN_SEEDS."""
    mean, count = statistics.mean(differences), len(differences)
    if count < MIN_SEEDS:
        return mean, None
    margin = T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1] * statistics.stdev(differences) / math.sqrt(count)
    return mean, (mean - margin, mean + margin)


def base_of(name, experiments, first=None):
    """The experiment to compare another with, or None: ``first``, or the one it builds on; a user's own on train."""
    own_base = "train" if "train" in experiments else next(iter(experiments))
    base = first or EXPERIMENTS.get(name, (own_base,))[0]
    return base if base in experiments and base != name else None


def full_name(name, runs):
    """The name of an experiment with the title of its runs, if they have one: "train_4_a: cosine annealing"."""
    titles = [run.metrics["title"] for run in runs if run.metrics["title"]]
    return f"{name}: {titles[0]}" if titles else name


def difference_row(name, runs, base_name, base, split):
    """A row on what an experiment changes, None without a common seed; ``runs`` and ``base`` map a seed to a Run."""
    pairs = [(runs[seed], base[seed]) for seed in runs if seed in base]
    if not pairs:
        return None
    mean, interval = mean_and_interval([run.score(split, "miou") - other.score(split, "miou") for run, other in pairs])
    changes = mean_without_nan([run.class_ious(split) - other.class_ious(split) for run, other in pairs])
    ranked = sorted(zip(np.nan_to_num(changes).tolist(), pairs[0][0].classes))
    gains = [f"{label} {change:+.2f}" for change, label in ranked[::-1] if change >= 0.005][:3]
    losses = [f"{label} {change:+.2f}" for change, label in ranked if change <= -0.005][:3]
    return {
        "experiment": name,
        "compared with": base_name,
        "split": split,
        "difference in mean IoU": f"{mean:+.4f}",
        "95 % interval": "{:+.4f} to {:+.4f}".format(*interval) if interval else "-",
        "clear": ("yes" if interval[0] > 0 or interval[1] < 0 else "no") if interval else "-",
        "classes that gain": ", ".join(gains) or "-",
        "classes that lose": ", ".join(losses) or "-",
    }


def mean_without_nan(arrays):
    """The mean over a list of float arrays, element by element; NaN only where all are NaN."""
    return torch.tensor(np.stack(arrays)).nanmean(0).numpy()


def mean_and_std(values):
    """Mean ± standard deviation as text, NaN left out; without ± for a single value."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def markdown_table(rows):
    """A table in Markdown from dicts that map headings to cells."""
    headings = html.headings(rows)
    cells = [[str(row.get(name, "")).replace("|", "\\|").replace("<", "&lt;") for name in headings] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *cells])


def result_row(name, runs):
    """A row with the results of an experiment: a dict from heading to cell."""
    row = {"experiment": full_name(name, runs)}
    for split in runs[0].splits:
        row[f"{split} mean IoU"] = mean_and_std([run.score(split, "miou") for run in runs])
        row[f"{split} pixel accuracy"] = mean_and_std([run.score(split, "pixel_accuracy") for run in runs])
    split = runs[0].splits[-1]
    row[f"{split}, the assignment's IoU"] = mean_and_std([run.score(split, "assignment_iou") for run in runs])
    if runs[0].metrics["dataset"] == "VOC2007":
        row["published IoU"] = EXPERIMENTS.get(name, (None, None))[1] or ""
    flags = runs[0].metrics["flags"]
    row |= {"seeds": len(runs), "epochs": flags["epochs"], "batch": flags["batch_size"]}
    return row | {"parameters": f"{runs[0].metrics['parameters'] / 1e6:.2f} M"}


def machine(run):
    """The device of a run and its version of PyTorch, as text."""
    return f"{run.metrics['device']}, torch {run.metrics['versions']['torch']}"


def changes_since(runs):
    """Rows about runs of other code than today's, or of other image ids or masks than most runs."""
    hashes, rows = {}, {}  # hashes of ids and masks by the input's size, to which masks are resized
    for run in runs:
        hashes.setdefault(str(run.metrics.get("size")), []).append(run.metrics.get("data_sha256"))
    for run in runs:
        is_usual = run.metrics.get("data_sha256") == statistics.mode(hashes[str(run.metrics.get("size"))])
        changes = [run.code_change(), None if is_usual else "other image ids or masks"]
        if any(changes):
            rows.setdefault((run.name, "; ".join(filter(None, changes))), []).append(str(run.seed))
    return [{"experiment": name, "seeds": ", ".join(seeds), "change": change} for (name, change), seeds in rows.items()]


def sections(experiments, failures, first=None):
    """The parts of the comparison, a list of html.Section, from ``collect`` and ``run_missing``; see ``base_of``."""
    runs = [run for seeds in experiments.values() for run in seeds.values()]
    splits, metrics = runs[0].splits, runs[0].metrics
    limit = metrics["flags"]["limit"]
    images = "all images" if limit is None else f"the first {limit} images of each split"
    command_line = files.command_line([Path(sys.argv[0]).name, *sys.argv[1:]])
    text = f"`python {command_line}`; runs on {'; '.join(sorted(set(map(machine, runs))))}.\n\n{RESULTS}"
    baseline = {"experiment": baseline_name(runs[0].classes)}
    for split in splits:
        baseline[f"{split} mean IoU"] = f"{metrics[split]['background']['miou']:.4f}"
        baseline[f"{split} pixel accuracy"] = f"{metrics[split]['background']['pixel_accuracy']:.4f}"
    results = [result_row(name, list(seeds.values())) for name, seeds in experiments.items()]
    differences = [
        difference_row(full_name(name, seeds.values()), seeds, base, experiments[base], split)
        for name, seeds in experiments.items()
        if (base := base_of(name, experiments, first))
        for split in splits
    ]
    title, plot = f"Results on {metrics['dataset']}, {images}", ("plots/comparison.png", "Mean IoU of each experiment")
    found = [
        html.Section(title, text, [baseline, *results], plot=plot),
        html.Section("Differences", DIFFERENCES, list(filter(None, differences))),
        html.Section("Classes", plot=("plots/classes.png", f"IoU of each class on {splits[-1]}")),
        html.Section("Epochs", plot=("plots/curves.png", "Loss and mean IoU over the epochs")),
        html.Section("Changed since", CHANGED, changes_since(runs)),
        html.Section("Failed", rows=[{"command": line} for line in failures]),
    ]
    return [section for section in found if section.rows or section.plot]


def report(found):
    """The comparison as Markdown; ``found`` is from ``sections``."""
    parts = []
    for section in found:
        parts += [f"{'##' if parts else '#'} {section.heading}", section.text]
        if section.rows:
            parts.append(markdown_table(section.rows))
        if section.plot:
            parts.append("![{1}]({0})".format(*section.plot))
    return "\n\n".join(part for part in parts if part) + "\n"


def write_html(out, experiments, found):
    """Write the comparison as HTML, with the single runs and links to their reports."""
    runs, rows = [run for seeds in experiments.values() for run in seeds.values()], []
    for run in runs:
        row = {"experiment": run.name, "seed": run.seed}
        row |= {f"{split} mean IoU": mean_and_std([run.score(split, "miou")]) for split in run.splits}
        row |= {name.replace("_", " "): f"{run.metrics[name]:.0f}" for name in ("epochs", "best_epoch", "seconds")}
        row["machine"] = machine(run)
        if run.report.exists():
            address = urllib.parse.quote(run.report.relative_to(out).as_posix())
            row["report"] = Markup('<a href="{}">report</a>').format(address)
        rows.append(row)
    single = html.Section("Runs", rows=rows, bars=[f"{split} mean IoU" for split in runs[0].splits])
    results = dataclasses.replace(found[0], heading="Results")
    summary = f"{len(experiments)} experiments, {len(rows)} runs"
    html.write(out / "RESULTS.html", found[0].heading, summary, [results, *found[1:], single])


def draw_plots(out, experiments):
    """Draw the plots of a comparison."""
    runs = {full_name(name, seeds.values()): list(seeds.values()) for name, seeds in experiments.items()}
    run = next(iter(runs.values()))[0]
    split, plots, limit = run.splits[-1], out / "plots", run.metrics["flags"]["limit"]
    files.make_folder(plots)
    dataset = run.metrics["dataset"] + (f" (first {limit} images)" if limit else "")
    baselines = {name: (baseline_name(run.classes), run.metrics[name]["background"]["miou"]) for name in run.splits}
    mious = {name: [run.score(split, "miou") for run in seeds] for name, seeds in runs.items()}
    plotting.comparison(plots / "comparison.png", f"{dataset}, {split}", mious, baselines[split])
    ious = np.stack([mean_without_nan([run.class_ious(split) for run in seeds]) for seeds in runs.values()])
    plotting.classes_by_experiment(plots / "classes.png", f"{dataset}, {split}", list(runs), run.classes, ious)
    histories = {name: [run.history for run in seeds] for name, seeds in runs.items()}
    losses = {name: " and ".join(sorted({run.metrics["loss"] for run in seeds})) for name, seeds in runs.items()}
    plotting.histories(plots / "curves.png", dataset, histories, losses, baselines["val"])


def main():
    parser = cli.shared_flags(__doc__)
    parser.add_argument("--seeds", type=cli.integer(0), nargs="+", default=[], metavar="N", help="seeds to run")
    parser.add_argument("--experiments", nargs="+", metavar="NAME", help="names of scripts (default: all eight)")
    end = [*sys.argv, "--"].index("--")
    args = parser.parse_args(sys.argv[1:end])
    args, args.own = parser.parse_known_args(sys.argv[end + 1 :], args)  # what is left are flags of the scripts' own
    args.experiments = args.experiments and [name.removesuffix(".py") for name in args.experiments]
    for name in args.experiments or ():
        if args.seeds and not (ROOT / f"{name}.py").is_file():
            raise UserError(f"--experiments {name}: there is no {ROOT / name}.py: correct the name")
    failures = run_missing(args)
    experiments = collect(args)
    if not experiments and not failures:
        advice = "correct them, --out or --experiments (a script's own flags follow --), or train with --seeds 0 1 2"
        raise UserError(f"{args.out}: no finished run with these flags: {advice}")
    if experiments:
        found = sections(experiments, failures, first=args.experiments and next(iter(experiments)))
        text = report(found)
        files.write(args.out / "RESULTS.md", text.encode())
        draw_plots(args.out, experiments)
        write_html(args.out, experiments, found)
        print(text)
    if failures:
        raise UserError(f"{len(failures)} runs failed; the same command tries them again: {'; '.join(failures)}")


if __name__ == "__main__":
    cli.run(main)
