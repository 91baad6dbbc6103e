"""Export a trained model as an ONNX file, or a web page, that needs none of this project's code: docs/EXPORT.md."""

import hashlib
import json
import logging
from importlib.util import find_spec
from pathlib import Path

import torch

import predict
from seg import checkpoint, cli, files, imaging, onnx_graph
from util import UserError, background_label

PAGE_FILES = "model.onnx", "model.json", "index.html", "page.js"
MIN_SHARE = 0.995  # of pixels that get the class that predict.py predicts


def compare(path, model, sizes):
    """The share of pixels that get the same class in onnxruntime as from predict.py, the lowest of photos of ``sizes``.

    The sizes are (height, width).
    """
    import onnxruntime  # only here: an optional package

    session, shares = onnxruntime.InferenceSession(path), []
    areas = imaging.to_rgb(imaging.palette_image((torch.arange(35).view(5, 7) * 7).byte().numpy()))
    for height, width in sizes:
        photo = areas.resize((width, height))
        (result,) = session.run(None, {"photo": imaging.resize(photo, (height, width))})
        labels = result.argmax(0) if result.ndim == 3 else result
        shares.append((labels == predict.segment(model, photo)).mean())
    return min(shares)


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a best_*.pt")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the checkpoint's name with .onnx")
    parser.add_argument("--page", type=Path, metavar="DIR", help="write a web page with the model instead")
    text = "output class probabilities at the network's size instead of the mask"
    parser.add_argument("--probabilities", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # PyTorch's, about its own code
    if args.page and (args.out or args.probabilities):
        raise UserError("--page writes a model.onnx that outputs masks into DIR: leave out --out and --probabilities")
    out = args.out or args.checkpoint.with_suffix(".onnx")
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: choose a name that ends with .onnx")
    paths = [args.page / name for name in PAGE_FILES] if args.page else [out]
    predict.check_new(paths, args.overwrite)
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise UserError("export.py needs more packages: pip install onnx onnxscript")
    model, state = checkpoint.load(args.checkpoint), checkpoint.read(args.checkpoint, "size")
    files.make_folder(paths[0].parent)

    metadata = {name: state.get(name) for name in ("classes", "size", "experiment", "dataset", "epoch", "val_miou")}
    metadata |= {"palette": imaging.PALETTE.tolist(), "overlay_colours": imaging.DISTINCT_COLOURS.tolist()}
    metadata["background"] = background_label(model.classes)
    metadata["sha256"] = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()
    end = onnx_graph.PROBABILITIES if args.probabilities else onnx_graph.MASK
    contents = [onnx_graph.convert(model, end, metadata).SerializeToString(), json.dumps(metadata).encode()]
    contents += [Path(onnx_graph.__file__).with_name("page").joinpath(name).read_bytes() for name in PAGE_FILES[2:]]
    for path, content in zip(paths, contents):  # without --page, only the model
        files.write(path, content)
    print("wrote", *paths)

    if find_spec("onnxruntime"):
        share = compare(paths[0], model, [model.size] if args.probabilities else [(389, 517), (517, 389)])
        print(f"in onnxruntime, {share:.3%} of a photo's pixels get the class that predict.py predicts")
        if share < MIN_SHARE:
            print(f"the file differs from predict.py: that is less than {MIN_SHARE:.1%}, and the exit code is 1")
            raise SystemExit(1)
    else:
        print("not compared with predict.py: pip install onnxruntime")
    if args.page:
        print(f"next: npm install --no-save --prefix {args.page} onnxruntime-web@1")
        print(f"then: python -m http.server --directory {args.page}, and open http://localhost:8000")


if __name__ == "__main__":
    cli.run(main)
