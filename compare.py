"""Compare the experiments over several seeds; run what is missing first.

    python compare.py                                             report the runs that are there
    python compare.py --seeds 0 1 2                               first run what is missing of the eight scripts
    python compare.py --seeds 0 1 2 --experiments train train_x   the same for train.py and train_x.py

Each run is the command that a user would type, with the output folder OUT/seed0, OUT/seed1 and so on. A stopped run is
resumed, a finished one is not repeated, and one that fails is reported at the end. Runs in OUT itself count too.
Writes OUT/RESULTS.md, the same as OUT/RESULTS.html with links to the reports of the runs, and, in OUT/plots,
comparison.png, classes.png and curves.png.
"""

import ast
import math
import shlex
import statistics
import subprocess
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from seg import cli, files, html, plotting
from seg.run import Run
from util import UserError

ROOT = Path(__file__).resolve().parent

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

MINUTES = """\
Minutes of training and validation until mean IoU on val, at the input's size, first reaches a value, and until the end.
Means are over the seeds on the same device that reach it; "2 of 3" says how many do."""

DIFFERENCES = f"""\
Differences are paired by seed. From {MIN_SEEDS} seeds on, the 95 % interval is that of the paired t-test over seeds; a
difference is clear if it excludes 0. The classes are the three that change most."""

CHANGED = """\
The code of these runs has changed since, or their image ids or masks differ from those of most runs. To repeat one,
call its script with the same flags, also --seed and --out, and with --overwrite; or compare with another --out."""


def finished_runs(out, experiment="*", seed="*"):
    """The finished runs below a folder, a list of Run; one that was continued and is not at its end is left out."""
    name = f"{experiment}_seed{seed}.json"
    folders = [folder for folder in sorted(out.glob("seed*")) if folder.name.removeprefix("seed").isdecimal()]
    paths = [path for folder in (*folders, out) for path in sorted((folder / "results").glob(name))]
    return [run for run in map(Run.read, paths) if len(run.history) == run.metrics["epochs"]]


def collect(args):
    """The finished runs that the flags ask for: a dict from experiment to a dict from seed to Run.

    If there are none, and all runs in the folder have one setting, these.
    """
    runs = finished_runs(args.out)
    if args.experiments is not None:
        names = {f"{name}{suffix}" for name in args.experiments for suffix in ("", "_no_pretrained")}
        runs = [run for run in runs if run.metrics["experiment"] in names]
    matching = [run for run in runs if run.matches(args)]
    given = (args.limit, args.epochs, args.batch_size, args.seeds or None)
    if not matching and given == (None,) * 4 and len({run.setting for run in runs}) == 1:
        matching = runs
    experiments = {}
    for run in matching:
        experiments.setdefault(run.metrics["experiment"], {}).setdefault(run.metrics["seed"], run)
    for run in matching:
        if (run.splits, run.classes) != (matching[0].splits, matching[0].classes):
            problem = f"{run.path}: differs from {matching[0].path} in the names of the classes or the splits"
            raise UserError(f"{problem}: repeat one of the runs with --overwrite, or compare with another --out")
    names = [name for name in EXPERIMENTS if name in experiments] + sorted(experiments.keys() - EXPERIMENTS.keys())
    return {name: experiments[name] for name in names}


def no_match(args):
    """Why there is nothing to report, and what to do."""
    runs = finished_runs(args.out)
    settings = {run.setting for run in runs}
    if not runs:
        return "no finished run found: python compare.py --seeds 0 1 2 runs the experiments"
    if any(run.matches(args) for run in runs):
        return f"no finished run of {', '.join(args.experiments)}: correct --experiments or run them with --seeds"
    flags = ("--data", "--limit", "--epochs", "--batch-size")
    texts = [" ".join(f"{flag} {value}" for flag, value in zip(flags, each) if value is not None) for each in settings]
    return f"no finished run with these flags; there are runs with: {'; '.join(sorted(texts))}"


def command(args, script, seed):
    """The command line of a run: the script's name and its flags, as a list of str."""
    line = [script, "--data", args.data, "--seed", seed, "--device", args.device, "--resume"]
    line += ["--out", args.out / f"seed{seed}"]
    for name in ("epochs", "batch_size", "limit"):
        if getattr(args, name) is not None:
            line += ["--" + name.replace("_", "-"), getattr(args, name)]
    if args.compile:
        line.append("--compile")
    if not args.pretrained and _has_pretrained_flag(ROOT / script):
        line.append("--no-pretrained")
    return list(map(str, line))


def _has_pretrained_flag(script):
    calls = (node for node in ast.walk(ast.parse(script.read_bytes())) if isinstance(node, ast.Call))
    calls = (call for call in calls if ast.unparse(call.func) == "cli.arguments")
    return any(keyword.arg == "pretrained" for call in calls for keyword in call.keywords)


def run_missing(args):
    """Run what is missing; return a list of messages about runs that failed."""
    failures = []
    for seed in args.seeds:
        for name in args.experiments or EXPERIMENTS:
            line = command(args, f"{name}.py", seed)
            experiment = name + ("_no_pretrained" if "--no-pretrained" in line else "")
            if any(run.matches(args) for run in finished_runs(args.out, experiment, seed)):
                print(f"{name} seed {seed}: already done", flush=True)
                continue
            print(f"\n$ python {shlex.join(line)}", flush=True)
            process = subprocess.Popen([sys.executable, str(ROOT / line[0]), *line[1:]])
            try:
                process.wait()
            except KeyboardInterrupt:  # the run has received it too, and saves what it has
                process.wait()
                raise
            except SystemExit:  # SIGTERM reaches this process only
                process.terminate()
                process.wait()
                raise
            if process.returncode:
                failures.append(f"python {shlex.join(line)} ended with exit code {process.returncode}")
    return failures


def paired_difference(runs, base, split):
    """The mean difference in mean IoU between two experiments, paired by seed, and its 95 % interval (paired t-test).

    ``runs`` and ``base`` map a seed to a Run. Returns mean, low and high: low and high are None with fewer than
    MIN_SEEDS seeds, and all are None without a common seed.
    """
    differences = [runs[seed].score(split, "miou") - base[seed].score(split, "miou") for seed in runs if seed in base]
    differences = [value for value in differences if not math.isnan(value)]
    if not differences:
        return None, None, None
    mean = statistics.mean(differences)
    if len(differences) < MIN_SEEDS:
        return mean, None, None
    quantile = T_QUANTILES[min(len(differences) - 1, len(T_QUANTILES)) - 1]
    margin = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - margin, mean + margin


def base_of(name, experiments):
    """The experiment to compare another with, None if there is none.

    That of a run without pretraining is the same with it, and that of a user's own ``train``, or else the first one.
    """
    pretrained = name.removesuffix("_no_pretrained")
    base = pretrained if pretrained != name else EXPERIMENTS.get(name, ("train",))[0]
    if base not in experiments and name not in EXPERIMENTS:
        base = next(iter(experiments))
    return base if base in experiments and base != name else None


def full_name(name, runs):
    """The name of an experiment with its idea, if a run has recorded it: "train_4_a: cosine annealing"."""
    ideas = [run.metrics["idea"] for run in runs if run.metrics.get("idea")]
    return f"{name}: {ideas[0]}" if ideas else name


def difference_row(name, runs, base_name, base, split):
    """A row on what an experiment called ``name`` changes: a dict from heading to cell; None without a common seed."""
    mean, low, high = paired_difference(runs, base, split)
    if mean is None:
        return None
    differences = [runs[seed].class_ious(split) - base[seed].class_ious(split) for seed in runs if seed in base]
    by_class = mean_without_nan(differences)
    classes = next(iter(base.values())).classes
    ranked = [index for index in np.argsort(by_class) if not math.isnan(by_class[index])]
    changes = {index: f"{classes[index]} {by_class[index]:+.2f}" for index in ranked}
    gains = [changes[index] for index in ranked[:-4:-1] if by_class[index] >= 0.005]
    losses = [changes[index] for index in ranked[:3] if by_class[index] <= -0.005]
    return {
        "experiment": name,
        "compared with": base_name,
        f"difference in {split} mean IoU": f"{mean:+.4f}",
        "95 % interval": "-" if low is None else f"{low:+.4f} to {high:+.4f}",
        "clear": "-" if low is None else "yes" if low > 0 or high < 0 else "no",
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


def header_and_cells(rows):
    """The headings of a table and its rows as lists, from dicts that map headings to cells."""
    headings = list(dict.fromkeys([*max(rows, key=len), *(name for row in rows for name in row)]))
    return headings, [[row.get(name, "") for name in headings] for row in rows]


def markdown_table(rows):
    """A table in Markdown from dicts that map headings to cells."""
    headings, cells = header_and_cells(rows)
    cells = [[str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [headings, ["---"] * len(headings), *cells])


def result_row(name, runs, splits):
    """A row with the results of an experiment: a dict from heading to cell."""
    first = runs[0].metrics
    row = {"experiment": full_name(name, runs), "seeds": len(runs)}
    for heading, flag in (("epochs", "epochs"), ("batch", "batch_size")):
        row[heading] = ", ".join(sorted({str(run.metrics["flags"][flag]) for run in runs}))
    for split in splits:
        row[f"{split} pixel accuracy"] = mean_and_std([run.score(split, "pixel_accuracy") for run in runs])
        row[f"{split} mean IoU"] = mean_and_std([run.score(split, "miou") for run in runs])
    final = splits[-1]
    row[f"{final}, the assignment's IoU"] = mean_and_std([run.score(final, "assignment_iou") for run in runs])
    if first["dataset"] == "VOC2007":
        row["published IoU"] = EXPERIMENTS.get(name, (None, None))[1] or ""
    row["parameters"] = f"{first['parameters'] / 1e6:.2f} M"
    row["multiply-adds"] = f"{first['multiply_adds'] / 1e9:.2f} G"
    return row


def minutes_row(name, runs, device, mious):
    """A row on how long an experiment takes on a device to reach some mean IoUs: a dict from heading to cell."""
    row = {"experiment": full_name(name, runs), "device": device}
    runs = [run for run in runs if run.metrics["device"] == device]
    for miou in mious:
        minutes = [value for value in (run.minutes_until(miou) for run in runs) if not math.isnan(value)]
        cell = f"{statistics.mean(minutes):.1f}" if minutes else "-"
        row[f"{miou:.2f}"] = cell + (f" ({len(minutes)} of {len(runs)})" if 0 < len(minutes) < len(runs) else "")
    return row | {"end": f"{statistics.mean(run.metrics['seconds'] for run in runs) / 60:.1f}"}


def background_shares(run):
    """The baseline's pixel accuracy on each split, which depends on its masks at full resolution only: a tuple."""
    return tuple(run.metrics[split]["background"]["pixel_accuracy"] for split in run.splits)


def changes_since(experiments):
    """Rows about runs of other code than now, or of other data than most: a list of dicts from heading to cell."""
    runs = [run for seeds in experiments.values() for run in seeds.values()]
    hashes = {}  # of the data, from input size to the hash of each run: masks of another size have another one
    for run in runs:
        if "data_sha256" in run.metrics:
            hashes.setdefault(tuple(run.metrics["size"]), []).append(run.metrics["data_sha256"])
    usual_shares = statistics.mode(map(background_shares, runs))
    rows = []
    for name, seeds in experiments.items():
        for seed, run in seeds.items():
            changes = [run.code_change(ROOT)]
            other_data = background_shares(run) != usual_shares
            if "data_sha256" in run.metrics:
                usual = statistics.mode(hashes[tuple(run.metrics["size"])])
                other_data = other_data or run.metrics["data_sha256"] != usual
            changes += ["other image ids or masks"] * other_data
            if any(changes):
                rows.append({"experiment": name, "seed": seed, "change": "; ".join(filter(None, changes))})
    return rows


@dataclass
class Section:
    """A part of a comparison: Markdown, then a table as a list of dicts, then a plot, its name and what it shows."""

    heading: str
    text: str = ""
    rows: list | tuple = ()
    plot: tuple | None = None


def sections(experiments, failures):
    """The parts of the comparison. ``experiments`` is from ``collect``, ``failures`` from ``run_missing``."""
    runs = [run for seeds in experiments.values() for run in seeds.values()]
    dataset, limit, *_ = runs[0].setting
    splits, final = runs[0].splits, runs[0].splits[-1]
    baseline = {"experiment": runs[0].baseline_name}
    for split in splits:
        baseline[f"{split} pixel accuracy"] = f"{runs[0].metrics[split]['background']['pixel_accuracy']:.4f}"
        baseline[f"{split} mean IoU"] = f"{runs[0].metrics[split]['background']['miou']:.4f}"
    results = [result_row(name, list(seeds.values()), splits) for name, seeds in experiments.items()]
    pairs = [(name, base) for name in experiments if (base := base_of(name, experiments))]
    rows = [
        difference_row(full_name(name, experiments[name].values()), experiments[name], base, experiments[base], final)
        for name, base in pairs
    ]
    differences = [row for row in rows if row]

    machines = sorted({run.machine for run in runs})
    images = "all images" if limit is None else f"the first {limit} images of each split"
    text = f"""`python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`; runs on {"; ".join(machines)}.

Mean ± standard deviation over the seeds, at full resolution, void excluded; val selects the best epoch."""
    plot = ("comparison", "mean IoU of each experiment")
    found = [Section(f"Results on {dataset}, {images}", text, [baseline, *results], plot)]
    if differences:
        found.append(Section("Differences", DIFFERENCES, differences))
    found.append(Section("Classes", plot=("classes", f"IoU of each class on {splits[-1]}")))
    found.append(Section("Epochs", plot=("curves", "loss and mean IoU over the epochs")))
    best = max(row["val_miou"] for run in runs for row in run.history)
    mious = [tenth / 10 for tenth in range(1, 10) if tenth / 10 <= best][-4:]
    minutes = [
        minutes_row(name, list(seeds.values()), device, mious)
        for name, seeds in experiments.items()
        for device in sorted({run.metrics["device"] for run in seeds.values()})
    ]
    found.append(Section("Minutes", MINUTES, minutes))
    if changes := changes_since(experiments):
        found.append(Section("Changed since", CHANGED, changes))
    if failures:
        found.append(Section("Failed", "\n\n".join(f"`{line}`" for line in failures)))
    return found


def report(found):
    """The comparison as Markdown; ``found`` is from ``sections``."""
    parts = []
    for section in found:
        parts += [f"{'##' if parts else '#'} {section.heading}", section.text]
        if section.rows:
            parts.append(markdown_table(section.rows))
        if section.plot:
            parts.append(f"![{section.plot[1]}](plots/{section.plot[0]}.png)")
    return "\n\n".join(part for part in parts if part) + "\n"


def run_row(run, out):
    """A row about a single run: a dict from heading to cell."""
    metrics = run.metrics
    row = {name: metrics[name] for name in ("experiment", "idea", "seed") if name in metrics}
    row |= {f"{split} mean IoU": mean_and_std([run.score(split, "miou")]) for split in run.splits}
    row |= {"epochs": metrics["epochs"], "best epoch": metrics.get("best_epoch", "")}
    row["seconds"] = f"{metrics['seconds']:.0f}"
    if run.report.exists():
        row["report"] = html.link(urllib.parse.quote(run.report.relative_to(out).as_posix()), "report")
    return row


def write_html(out, experiments, found):
    """Write the comparison as HTML, with the single runs, links to their reports, and the versions."""
    title, contents = "", {}
    for section in found:
        content = html.text(section.text)
        if section.rows:
            content += html.table(*header_and_cells(section.rows))
        if section.plot:
            name, caption = section.plot
            content += html.plot(out / "plots" / f"{name}.png", caption[0].upper() + caption[1:])
        contents[section.heading if title else "Results"] = content
        title = title or section.heading
    runs = [run for seeds in experiments.values() for run in seeds.values()]
    bars = [f"{split} mean IoU" for split in runs[0].splits]
    contents["Runs"] = html.table(*header_and_cells([run_row(run, out) for run in runs]), bars=bars)
    versions = {}
    for run in runs:
        for name, version in run.metrics["versions"].items():
            versions.setdefault(name, {})[version] = None
    contents["Versions"] = html.settings({name: ", ".join(values) for name, values in versions.items()})
    html.write(out / "RESULTS.html", title, f"{len(experiments)} experiments, {len(runs)} runs", contents)


def draw_plots(out, experiments):
    """Draw the plots of a comparison."""
    experiments = {full_name(name, seeds.values()): list(seeds.values()) for name, seeds in experiments.items()}
    run = next(iter(experiments.values()))[0]
    split, plots = run.splits[-1], out / "plots"
    with files.writing(plots):
        plots.mkdir(parents=True, exist_ok=True)
    dataset, limit, *_ = run.setting
    dataset += f" (first {limit} images)" if limit else ""
    title = f"{dataset}, {split}"
    mious = {name: [run.score(split, "miou") for run in runs] for name, runs in experiments.items()}
    mious = {name: [value for value in values if not math.isnan(value)] for name, values in mious.items()}
    baseline, val_baseline = ((run.baseline_name, run.metrics[name]["background"]["miou"]) for name in (split, "val"))
    plotting.comparison(plots / "comparison.png", title, mious, baseline)
    ious = [mean_without_nan([run.class_ious(split) for run in runs]) for runs in experiments.values()]
    plotting.classes_by_experiment(plots / "classes.png", title, list(experiments), run.classes, np.stack(ious))
    histories = {name: [run.history for run in runs] for name, runs in experiments.items()}
    losses = {name: {run.metrics.get("loss") or "" for run in runs} for name, runs in experiments.items()}
    losses = {name: " and ".join(sorted(found)) or None for name, found in losses.items()}
    plotting.histories(plots / "curves.png", dataset, histories, losses, val_baseline)


def main():
    parser = cli.shared_flags(__doc__)
    parser.add_argument("--seeds", type=cli.integer(0), nargs="+", default=[], metavar="N", help="seeds to run")
    parser.add_argument("--experiments", nargs="+", metavar="NAME", help="names of scripts (default: all eight)")
    args = parser.parse_args()
    for name in args.experiments or ():
        if args.seeds and not (ROOT / f"{name}.py").is_file():
            raise UserError(f"--experiments {name}: there is no {ROOT / name}.py: correct the name")
    failures = run_missing(args)
    experiments = collect(args)
    if not experiments and not failures:
        raise UserError(f"{args.out}: {no_match(args)}")
    if experiments:
        found = sections(experiments, failures)
        text = report(found)
        with files.atomic_write(args.out / "RESULTS.md") as file:
            file.write(text.encode())
        draw_plots(args.out, experiments)
        write_html(args.out, experiments, found)
        print(text)
    if failures:
        raise UserError(f"{len(failures)} runs failed; the same command tries them again: {'; '.join(failures)}")


if __name__ == "__main__":
    cli.run(main)
