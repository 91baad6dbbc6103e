"""Score the best checkpoints of several seeds on further split lists, such as one for each drive of a test split.

    lists=data/VOCdevkit/CamVid/ImageSets/Segmentation
    python benchmarks/splits.py comparison $lists/test_Seq05VD.txt $lists/test_0001TP.txt

Takes the finished runs that compare.py has left in OUT, adds the results to OUT/splits.json, and prints a table of mean
IoU: mean ± standard deviation over the seeds.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compare
import predict
import voc
from seg import checkpoint, cli, files
from util import UserError


def table(results):
    """The table in Markdown; ``results`` maps experiment, split list and seed to a dict of scores."""
    rows = []
    for experiment, splits in sorted(results.items()):
        row = {"experiment": experiment, "seeds": max(map(len, splits.values()))}
        for name, seeds in splits.items():
            row[name] = compare.mean_and_std([scores["miou"] for scores in seeds.values()])
        rows.append(row)
    return compare.markdown_table(rows)


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("lists", nargs="+", type=Path)
    args = parser.parse_args()
    path = args.out / "splits.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    runs = [run for run in compare.finished_runs(args.out) if run.best.exists()]
    if not runs:
        raise UserError(f"{args.out}: no finished run with its checkpoint: correct the path, or train one")
    for run in runs:
        model, splits = checkpoint.load(run.best), results.setdefault(run.name, {})
        for ids in args.lists:
            split = voc.Split(ids.resolve().parents[2], ids.stem)
            scores = predict.evaluate(model, split).as_dict()
            splits.setdefault(f"{split.dataset} {split.name}", {})[f"seed{run.seed}"] = scores
        files.write(path, (json.dumps(results, indent=1) + "\n").encode())
    print(table(results))


if __name__ == "__main__":
    cli.run(main)
