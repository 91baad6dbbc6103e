"""Compare the experiments over several seeds, with error bars; run what is missing first.

    python compare.py                  reports the runs that are there
    python compare.py --seeds 0 1 2    first runs what is missing of the seven scripts for these seeds

Each run is the command that a user would type, into OUT/seed0, OUT/seed1 and so on; one that was stopped is resumed,
one that is done is not done again, and one that fails is reported while the rest goes on. Runs in OUT itself count too.
Writes OUT/RESULTS.md and, in OUT/plots, comparison.png, classes.png and curves.png.
"""

import csv
import json
import math
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import engine
import plotting
from util import UserError, replacing, run, writing

# Each experiment, what it builds on, and the IoU published for it: one run, counted in the assignment's own way.
EXPERIMENTS = {
    "train": (None, 0.055),
    "train_4_a": ("train", 0.0613),
    "train_4_b": ("train_4_a", 0.0639),
    "train_4_c": ("train_4_b", 0.068),
    "train_5_a": ("train", 0.0765),
    "train_5_b": ("train", 0.15),
    "train_5_c": ("train", 0.087),
}
RESAMPLES = 2000
ENOUGH_SEEDS = 3  # from here on, seeds tell more about the next run than images do


@dataclass
class Run:
    """A finished run: the figures of its JSON, its epochs, and per split the counts of each image, int64 [N, 3, C]."""

    figures: dict
    history: list
    images: dict

    @classmethod
    def read(cls, path):
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
            with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
                history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            with np.load(path.with_suffix(".npz")) as file:
                images = {name: file[name] for name in file}
            figures["experiment"], figures["val"]["miou"], figures["flags"]["limit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not what a run wrote ({error!r}): delete it and run again") from None
        return cls(figures, history, images)

    @property
    def splits(self):
        """The splits with figures; the last is the one to compare by."""
        return ("val",) if self.figures["test"] is None else ("val", "test")

    @property
    def constant(self):
        """What is predicted everywhere in the figures to beat."""
        return "background" if "background" in self.figures["val"]["iou"] else "the commonest class"

    @property
    def pace(self):
        """Seconds an epoch took."""
        return self.figures["seconds"] / self.figures["epochs"]

    def score(self, split, name):
        """A figure of a split as a float, NaN where there is none."""
        value = (self.figures[split] or {}).get(name)
        return math.nan if value is None else value


def paths(out, experiment="*", seed="*"):
    """The JSON files of finished runs under a folder."""
    name = f"{experiment}_seed{seed}.json"
    return sorted(path for folder in (out, *out.glob("seed*")) for path in (folder / "results").glob(name))


def collect(out):
    """All runs under a folder: a dict from (data set, limit) to a dict from experiment to a dict from seed to Run."""
    groups = {}
    for path in paths(out):
        one = Run.read(path)
        group = groups.setdefault((one.figures["dataset"], one.figures["flags"]["limit"]), {})
        group.setdefault(one.figures["experiment"], {}).setdefault(one.figures["seed"], one)
    return groups


def is_done(args, experiment, seed):
    """Whether a run with these flags is there. A flag that was not given is the experiment's own and fits any run."""
    for path in paths(args.out, experiment, seed):
        figures = Run.read(path).figures
        wanted = {"dataset": Path(args.data).resolve().name, "limit": args.limit}
        wanted |= {name: value for name in ("epochs", "batch_size") if (value := getattr(args, name)) is not None}
        if wanted.items() <= ({"dataset": figures["dataset"]} | figures["flags"]).items():
            return True
    return False


def run_missing(args):
    """Run what is missing; return the lines on what failed."""
    failures = []
    for seed in args.seeds:
        for script in EXPERIMENTS:
            random = script == "train_5_b" and not args.pretrained
            if is_done(args, script + "_no_pretrained" * random, seed):
                print(f"{script} seed {seed}: done before", flush=True)
                continue
            line = [f"{script}.py", "--data", args.data, "--seed", seed, "--device", args.device, "--resume"]
            line += ["--out", args.out / f"seed{seed}"] + ["--no-pretrained"] * random + ["--compile"] * args.compile
            for name in ("epochs", "batch_size", "limit"):
                if getattr(args, name) is not None:
                    line += ["--" + name.replace("_", "-"), getattr(args, name)]
            line = list(map(str, line))
            print(f"\n$ python {shlex.join(line)}", flush=True)
            process = subprocess.Popen([sys.executable, str(engine.ROOT / line[0]), *line[1:]])
            try:
                code = process.wait()
            except KeyboardInterrupt:  # it came to the run as well, which keeps what it has
                process.wait()
                raise
            except SystemExit:  # a signal to this process alone: no run may go on unseen
                process.terminate()
                process.wait()
                raise
            if code:
                failures.append(f"python {shlex.join(line)} ended with exit code {code}")
    return failures


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t with a whole number of degrees of freedom.

    The share within -t .. t is a finite sum of powers of cos(atan(t / sqrt(freedom))) (Abramowitz and Stegun, 1964,
    26.7.3 and 26.7.4); it grows with t, so that halving an interval finds where it is 95 %.
    """

    def inside(angle):
        term, total = (math.cos(angle) if freedom % 2 else 1.0), 0.0
        for power in range(freedom % 2, freedom - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        return 2 / math.pi * (angle + math.sin(angle) * total) if freedom % 2 else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


@dataclass
class Difference:
    """A mean of paired differences, its 95 % interval, and over what that was taken: "seeds" or "images"."""

    mean: float
    low: float
    high: float
    over: str

    @property
    def clear(self):
        return self.low > 0 or self.high < 0


def difference(runs, base, split):
    """The paired difference in mean IoU between two experiments, over the seeds that both have.

    From three seeds on, the interval is Student's t over the seeds. With fewer, it is a percentile bootstrap over the
    images of the split (Efron, 1979): it tells what other images would change, and nothing about other seeds.

    Args:
        runs, base: dicts from seed to Run.
        split: "val" or "test".

    Returns:
        Difference, or None where no seed has both.
    """
    pairs = [(runs[seed], base[seed]) for seed in sorted(runs.keys() & base.keys())]
    pairs = [pair for pair in pairs if not any(math.isnan(one.score(split, "miou")) for one in pair)]
    if not pairs:
        return None
    values = [one.score(split, "miou") - other.score(split, "miou") for one, other in pairs]
    mean = statistics.mean(values)
    if len(values) >= ENOUGH_SEEDS:
        reach = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return Difference(mean, mean - reach, mean + reach, "seeds")
    number = len(pairs[0][0].images[split])
    chosen = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES)
    resampled = [resample(one.images[split], chosen) - resample(other.images[split], chosen) for one, other in pairs]
    low, high = np.nanpercentile(np.mean(resampled, 0), (2.5, 97.5))
    return Difference(mean, low.item(), high.item(), "images")


def resample(images, chosen):
    """Mean IoU, float64 [R], over images with counts [N, 3, C], each taken as often as ``chosen`` [R, N] says."""
    hits, truth, called = np.tensordot(chosen, images, 1).transpose(1, 0, 2)
    union = truth + called - hits
    iou = np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)
    return np.nanmean(iou, 1)


def builds_on(name):
    """The experiment to compare another with: one without pretraining with its namesake, a user's own with train."""
    namesake = name.removesuffix("_no_pretrained")
    return namesake if namesake != name else EXPERIMENTS.get(name, ("train",))[0]


def class_changes(runs, base, split):
    """A dict from each class that occurs to the mean difference in its IoU between two experiments, paired by seed."""
    seeds = runs.keys() & base.keys()
    ious = [[list(which[seed].figures[split]["iou"].values()) for seed in seeds] for which in (runs, base)]
    differences = torch.tensor(np.subtract(*np.array(ious, float))).nanmean(0).tolist()  # None is NaN
    names = next(iter(base.values())).figures[split]["iou"]
    return {name: value for name, value in zip(names, differences) if not math.isnan(value)}


def change_head(split):
    """The head of the table whose rows ``change`` gives, without its first two columns."""
    return [f"difference in {split} mean IoU", "95 % interval", "over", "", "classes that gain", "classes that lose"]


def change(name, runs, base_name, base, split):
    """A list with the row of a table on what an experiment changes, or an empty list where no seed has both."""
    found = difference(runs, base, split)
    if found is None:
        return []
    changes = class_changes(runs, base, split)
    ranked = sorted(changes, key=changes.get)
    gains = [name for name in ranked[:-4:-1] if changes[name] >= 0.005]
    losses = [name for name in ranked[:3] if changes[name] <= -0.005]
    listed = (", ".join(f"{name} {changes[name]:+.2f}" for name in names) or "-" for names in (gains, losses))
    interval = f"{found.low:+.4f} to {found.high:+.4f}"
    verdict = "clear" if found.clear else "not clear"
    return [[name, base_name, f"{found.mean:+.4f}", interval, found.over, verdict, *listed]]


def spread(values, digits=4):
    """Mean ± standard deviation of the numbers among some floats, as text; without ± for a single one."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(head, rows):
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def choose(groups, args):
    """The data set, limit and runs to report: those of the flags, or the only ones there are.

    Raises:
        UserError: there are none, or several to choose from.
    """
    if not groups:
        raise UserError(f"{args.out}: holds no finished run: python compare.py --seeds 0 1 2 makes some")
    asked = (Path(args.data).resolve().name, args.limit)
    if asked not in groups and len(groups) > 1:
        known = ", ".join(f"{name}" + (f" with --limit {limit}" if limit else "") for name, limit in groups)
        raise UserError(f"{args.out}: holds runs on several data sets ({known}): choose by --data and --limit")
    (dataset, limit), experiments = (asked, groups[asked]) if asked in groups else next(iter(groups.items()))
    known = [name for name in EXPERIMENTS if name in experiments]
    return dataset, limit, {name: experiments[name] for name in [*known, *sorted(experiments.keys() - set(known))]}


def report(dataset, limit, experiments, failures):
    """The comparison as Markdown."""
    runs = [one for seeds in experiments.values() for one in seeds.values()]
    splits = runs[0].splits
    final = splits[-1]

    constant = [
        f"{runs[0].figures[split]['background'][name]:.4f}" for split in splits for name in ("pixel_accuracy", "miou")
    ]
    rows = [[f"{runs[0].constant} everywhere", "", "", "", *constant, "", "", "", "", ""]]
    first = statistics.mean(one.pace for one in next(iter(experiments.values())).values())
    for name, seeds in experiments.items():
        seeds = list(seeds.values())
        figures = [one.figures for one in seeds]
        scores = [
            spread([one.score(split, score) for one in seeds])
            for split in splits
            for score in ("pixel_accuracy", "miou")
        ]
        rows.append(
            [
                name,
                len(seeds),
                *(", ".join(sorted({str(one["flags"][name]) for one in figures})) for name in ("epochs", "batch_size")),
                *scores,
                spread([one.score(final, "assignment_iou") for one in seeds]),
                EXPERIMENTS[name][1] if name in EXPERIMENTS else "",
                f"{figures[0]['parameters'] / 1e6:.2f} M",
                f"{figures[0]['multiply_adds'] / 1e9:.2f} G",
                f"{statistics.mean(one.pace for one in seeds) / first:.1f}",
            ]
        )
    head = ["experiment", "seeds", "epochs", "batch"]
    head += [f"{split} {score}" for split in splits for score in ("pixel accuracy", "mean IoU")]
    head += [f"{final}, the assignment's IoU", "published, VOC2007", "parameters", "multiply-adds", "time an epoch"]
    machines = sorted({f"{one.figures['device']}, torch {one.figures['versions']['torch']}" for one in runs})
    images = "all images" if limit is None else f"the first {limit} images of each split"

    changes = []
    for name, seeds in experiments.items():
        base = builds_on(name)
        if base in experiments:
            changes += change(name, seeds, base, experiments[base], final)

    text = f"""# Results on {dataset}, {images}

`python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`; runs on {"; ".join(machines)}.

Mean ± standard deviation over the seeds. The best epoch is chosen on val; figures are at the masks' own sizes, void
left out. The assignment's IoU counts otherwise; beside it stands what was published for VOC2007's test split. Time an
epoch is a multiple of the first experiment's, training and validation together.

{table(head, rows)}

![mean IoU of each experiment](plots/comparison.png)
"""
    if changes:
        head = ["experiment", "builds on", *change_head(final)]
        text += f"""
## What each idea changes

Differences are paired by seed. Intervals are over seeds from {ENOUGH_SEEDS} seeds on; with fewer, over images: then
they say nothing about other seeds. Clear means that the interval excludes 0. The classes are those that change most.

{table(head, changes)}
"""
    text += f"\n## Classes\n\n![IoU of each class on {final}](plots/classes.png)\n"
    text += "\n## Epochs\n\n![loss and mean IoU of each epoch](plots/curves.png)\n"
    if failures:
        text += "\n## Failed\n\n" + "\n".join(f"- `{line}`" for line in failures) + "\n"
    return text


def draw(out, dataset, experiments):
    """The pictures of a comparison."""
    run = next(iter(next(iter(experiments.values())).values()))
    split, first = run.splits[-1], run.figures
    scores = {
        name: [value for one in seeds.values() if not math.isnan(value := one.score(split, "miou"))]
        for name, seeds in experiments.items()
    }
    ious = [[list(one.figures[split]["iou"].values()) for one in seeds.values()] for seeds in experiments.values()]
    ious = torch.stack([torch.tensor(np.array(seeds, float)).nanmean(0) for seeds in ious]).numpy()  # None is NaN
    with writing(out / "plots"):
        (out / "plots").mkdir(parents=True, exist_ok=True)
    title = f"{dataset}, {split}"
    plotting.comparison(
        out / "plots" / "comparison.png", title, scores, (run.constant, first[split]["background"]["miou"])
    )
    plotting.classes_by_experiment(
        out / "plots" / "classes.png", title, list(experiments), list(first[split]["iou"]), ious
    )
    histories = {name: [one.history for one in seeds.values()] for name, seeds in experiments.items()}
    constant = (run.constant, run.figures["val"]["background"]["miou"])
    plotting.histories(out / "plots" / "curves.png", dataset, histories, constant)


def main():
    parser = engine.shared_flags(__doc__)
    parser.add_argument("--seeds", type=engine.whole(0), nargs="+", default=[], metavar="N", help="seeds to run")
    args = parser.parse_args()
    failures = run_missing(args)
    dataset, limit, experiments = choose(collect(args.out), args)
    text = report(dataset, limit, experiments, failures)
    draw(args.out, dataset, experiments)
    with replacing(args.out / "RESULTS.md") as file:
        file.write(text.encode())
    print(text)
    if failures:
        raise UserError(f"{len(failures)} runs failed; the same command tries them again: {'; '.join(failures)}")


if __name__ == "__main__":
    run(main)
