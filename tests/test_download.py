"""download.py against a server on 127.0.0.1 that behaves in turn as badly as servers do."""

import contextlib
import http.server
import io
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import scipy.io
from conftest import ROOT, make_tiny, write_split
from PIL import Image

import download
import voc
from util import UserError

TRAINVAL, TEST = "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` under paths whose first part names a behaviour; ``requests`` keeps (behaviour, name, Range)."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.stop = files, [], threading.Event()
        self.base = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        behaviour, name = self.path.strip("/").split("/")[0], self.path.rsplit("/", 1)[1]
        asked = self.headers.get("Range")
        self.server.requests.append((behaviour, name, asked))
        if behaviour == "missing":
            return self.send_error(404)
        if behaviour == "moved":
            self.send_response(302)
            self.send_header("Location", f"{self.server.base}/good/{name}")
            return self.end_headers()
        content = self.server.files[name]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and behaviour != "norange" else 0
        if start >= len(content):
            return self.send_error(416)
        if start:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        if behaviour in ("truncate", "stall", "norange"):
            body = body[: max(1, len(content) // 3)]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
            self.wfile.flush()
            if behaviour == "stall":
                self.server.stop.wait(20)


@pytest.fixture
def archives(tmp_path):
    """Bytes of two archives like VOC2007's, test apart, from the tiny set."""
    root = make_tiny(tmp_path / "source" / "VOC2007")
    made = {}
    for name, keep in ((TRAINVAL, lambda path: path.name != "test.txt"), (TEST, lambda path: path.name == "test.txt")):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path in sorted(root.rglob("*")):
                if path.is_file() and keep(path):
                    tar.add(path, f"VOCdevkit/VOC2007/{path.relative_to(root)}")
        made[name] = buffer.getvalue()
    return made


@pytest.fixture
def server(archives, monkeypatch, tmp_path):
    for name, content in archives.items():
        (tmp_path / name).write_bytes(content)
    checksums = {name: download.md5(tmp_path / name) for name in archives}
    monkeypatch.setitem(download.ARCHIVES, 2007, checksums)
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server = Server(archives)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


def mirrors(server, monkeypatch, *behaviours):
    templates = tuple(f"{server.base}/{behaviour}/voc{{year}}/{{name}}" for behaviour in behaviours)
    monkeypatch.setattr(download, "MIRRORS", templates)


def ranges(server, behaviour, name=TRAINVAL):
    return [asked for kind, file, asked in server.requests if (kind, file) == (behaviour, name)]


def test_md5_is_that_of_the_standard_tool(tmp_path):
    (tmp_path / "a").write_bytes(b"The quick brown fox jumps over the lazy dog")
    assert download.md5(tmp_path / "a") == "9e107d9d372bb6826bd81d3542a419d6"  # of RFC 1321's well-known example


def test_a_good_server_gives_a_data_set_that_can_be_read(server, monkeypatch, tmp_path):
    mirrors(server, monkeypatch, "good")
    download.get_voc(2007, tmp_path / "data")
    root = tmp_path / "data" / "VOCdevkit" / "VOC2007"
    assert [len(voc.Split(root, name)) for name in ("train", "val", "test")] == [5, 4, 3]
    assert download.verify(root) == 0
    assert [path.name for path in root.parent.iterdir()] == ["VOC2007"]  # nothing half-made is left


def test_what_is_there_is_left_alone(server, monkeypatch, tmp_path, capsys):
    mirrors(server, monkeypatch, "good")
    download.get_voc(2007, tmp_path / "data")
    asked = len(server.requests)
    download.get_voc(2007, tmp_path / "data")
    assert len(server.requests) == asked and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("behaviour", ["truncate", "stall"])
def test_a_broken_connection_is_continued_where_it_stopped(server, monkeypatch, tmp_path, archives, behaviour):
    mirrors(server, monkeypatch, behaviour)
    download.get_voc(2007, tmp_path / "data")
    third = len(archives[TRAINVAL]) // 3
    asked = ranges(server, behaviour)
    assert asked[:3] == [None, f"bytes={third}-", f"bytes={2 * third}-"]


def test_another_mirror_continues_what_the_first_began(server, monkeypatch, tmp_path, archives):
    mirrors(server, monkeypatch, "good")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL][:1000])
    download.get_voc(2007, tmp_path / "data")
    assert ranges(server, "good") == ["bytes=1000-"]


def test_a_server_without_range_is_asked_for_the_whole(server, monkeypatch, tmp_path, archives):
    mirrors(server, monkeypatch, "norange", "good")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL][:-10])
    download.get_voc(2007, tmp_path / "data")
    # it starts again, breaks off at a third, and the next mirror continues from there
    assert ranges(server, "good") == [f"bytes={len(archives[TRAINVAL]) // 3}-"]


def test_a_whole_file_left_under_part_is_taken(server, monkeypatch, tmp_path, archives):
    mirrors(server, monkeypatch, "good")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TRAINVAL}.part").write_bytes(archives[TRAINVAL])
    download.get_voc(2007, tmp_path / "data")
    assert len(ranges(server, "good")) == 1  # answered 416


def test_a_damaged_beginning_is_thrown_away(server, monkeypatch, tmp_path, archives):
    mirrors(server, monkeypatch, "good")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TRAINVAL}.part").write_bytes(b"x" * 1000)
    download.get_voc(2007, tmp_path / "data")
    assert ranges(server, "good") == ["bytes=1000-", None]


def test_bad_mirrors_are_passed_over_in_order(server, monkeypatch, tmp_path, capsys):
    mirrors(server, monkeypatch, "missing", "corrupt", "moved")
    download.get_voc(2007, tmp_path / "data")
    tried = [kind for kind, name, _ in server.requests if name == TRAINVAL]
    assert tried == ["missing", "corrupt", "moved", "good"]


def test_own_mirrors_come_first(server, monkeypatch, tmp_path):
    mirrors(server, monkeypatch, "missing")
    download.get_voc(2007, tmp_path / "data", mirrors=[f"{server.base}/good/"])
    assert {kind for kind, _, _ in server.requests} == {"good"}


def test_when_all_fail_each_is_named_with_its_reason_and_nothing_is_unpacked(server, monkeypatch, tmp_path):
    mirrors(server, monkeypatch, "missing", "corrupt")
    download.MIRRORS += ("http://127.0.0.1:1/{name}",)  # nothing listens there
    with pytest.raises(UserError) as error:
        download.get_voc(2007, tmp_path / "data")
    text = str(error.value)
    assert "missing/voc2007" in text and "Not Found" in text
    assert "corrupt/voc2007" in text and "MD5 is wrong" in text
    assert "127.0.0.1:1/" in text and "refused" in text
    assert "--tar" in text and "--toy" in text
    assert not (tmp_path / "data" / "VOCdevkit" / "VOC2007").exists()


def test_archives_on_disk_need_no_network_and_may_have_any_name(server, monkeypatch, tmp_path, archives):
    monkeypatch.setattr(download, "MIRRORS", ())
    tars = [tmp_path / "a copy.tar", tmp_path / "b.tar"]
    for path, content in zip(tars, archives.values()):
        path.write_bytes(content)
    download.get_voc(2007, tmp_path / "data", tars=tars[::-1])
    assert len(voc.Split(tmp_path / "data" / "VOCdevkit" / "VOC2007", "test")) == 3
    assert not server.requests and all(path.exists() for path in tars)


def test_a_wrong_archive_is_refused_by_its_md5(server, tmp_path, archives):
    (tmp_path / "cut.tar").write_bytes(archives[TEST][:-1])
    for path, word in ((tmp_path / "cut.tar", "has MD5"), (tmp_path / "none.tar", "cannot be read")):
        with pytest.raises(UserError, match=f"{path.name}: {word}"):
            download.get_voc(2007, tmp_path / "data", tars=[path])


def test_an_unfinished_data_set_is_named(server, tmp_path):
    make_tiny(tmp_path / "data" / "VOCdevkit" / "VOC2007", (("train", 1), ("val", 1)))
    with pytest.raises(UserError, match="VOC2007: is there, but without ImageSets.*test.txt"):
        download.get_voc(2007, tmp_path / "data")


def hostile(kind):
    info = tarfile.TarInfo("VOCdevkit/VOC2007/good.txt")
    if kind == "symlink":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
    elif kind == "hardlink":
        info.type, info.linkname = tarfile.LNKTYPE, "VOCdevkit/VOC2007/../../../secret"
    elif kind == "device":
        info.type = tarfile.CHRTYPE
    else:
        info.name = kind
    return info


@pytest.mark.parametrize(
    "kind",
    [
        "symlink",
        "hardlink",
        "device",
        "/absolute",
        "../outside",
        "VOCdevkit/VOC2007/../../outside",
        "VOCdevkit/VOC2012/other",
        "elsewhere/file",
        "VOCdevkit/VOC2007/C:\\file",
    ],
)
def test_an_archive_cannot_write_outside_its_folder(tmp_path, kind):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.addfile(hostile(kind))
    out = tmp_path / "a" / "b" / "VOC2007"
    out.parent.mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="refused"):
        download.unpack([tmp_path / "bad.tar"], out)
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_torn_archive_leaves_nothing(tmp_path, archives):
    (tmp_path / "torn.tar").write_bytes(archives[TRAINVAL][:5000])
    with pytest.raises(UserError, match="torn.tar: is no whole tar archive"):
        download.unpack([tmp_path / "torn.tar"], tmp_path / "VOC2007")
    assert [path.name for path in tmp_path.glob("VOC2007*")] == []


def test_a_killed_unpack_never_looks_finished(tmp_path, archives):
    """Kill the unpacking of a pipe that never ends: the data set must not be there, and the next unpack succeeds."""
    (tmp_path / "whole.tar").write_bytes(archives[TRAINVAL])
    code = (
        "import sys, time, pathlib, download\n"
        "class Slow(download.tqdm):\n"
        "    def __iter__(self):\n"
        "        for number, member in enumerate(super().__iter__()):\n"
        "            if number == 4: print('half', flush=True); time.sleep(60)\n"
        "            yield member\n"
        "download.tqdm = Slow\n"
        "download.unpack([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "whole.tar", tmp_path / "VOC2007"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate()
    assert not (tmp_path / "VOC2007").exists() and any(tmp_path.glob("VOC2007.unfinished/*"))
    download.unpack([tmp_path / "whole.tar"], tmp_path / "VOC2007")
    assert download.verify(tmp_path / "VOC2007") == 0


def test_verify_lists_every_fault(tiny, capsys):
    (tiny / "JPEGImages" / "000001.jpg").write_bytes(b"")
    (tiny / "SegmentationClass" / "000007.png").unlink()
    assert download.verify(tiny) == 2
    out = capsys.readouterr().out
    assert "000001.jpg: cannot be read" in out and "000007.png: no such file" in out
    assert "train: 5 images, 1 at fault" in out and "test: 3 images, 0 at fault" in out


def test_ctrl_c_keeps_what_has_arrived(server, tmp_path, archives):
    """A user's Ctrl-C in a stalled download: exit code 130, the first third kept for the next start."""
    code = f"import download, util; download.ARCHIVES[2007] = {download.ARCHIVES[2007]}; cli.run(download.main)"
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "data"), "--mirror", f"{server.base}/stall"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "data" / f"{TRAINVAL}.part"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert partial.read_bytes() == archives[TRAINVAL][: len(archives[TRAINVAL]) // 3]


@pytest.mark.parametrize("flags", [["--mirror", "ftp://x"], ["--year", "2010"], ["--tar", "none.tar"], ["--verify"]])
def test_bad_flags_end_with_exit_code_2_and_no_traceback(tmp_path, flags):
    command = [sys.executable, ROOT / "download.py", "--out", tmp_path, *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert flags[-1] in result.stderr or "VOC2007" in result.stderr


@pytest.fixture
def sbd(tmp_path, monkeypatch):
    """VOC2012's folder with three photos that it has no mask for, and an archive like SBD's with masks for some."""
    root = make_tiny(tmp_path / "data" / "VOCdevkit" / "VOC2012", (("train", 2), ("val", 2)))
    names = [f"2008_{number:06d}" for number in range(7)]
    for old, new in zip(("000000", "000001", "000002", "000003"), names):
        for path in root.rglob(f"{old}.*"):
            path.rename(path.with_stem(new))
    for split, ids in (("train", names[:2]), ("val", names[2:4])):
        write_split(root, split, ids)
    masks = {name: np.full((30, 40), 7 + number, np.uint8) for number, name in enumerate(names)}
    for name in names[4:]:
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{name}.jpg")
    archive = tmp_path / "any name.tgz"
    with tarfile.open(archive, "w:gz") as tar:

        def add(path, content):
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for name in names[1:6]:  # one of VOC's train, both of val and two of the rest
            file = io.BytesIO()
            scipy.io.savemat(file, {"GTcls": {"Segmentation": masks[name], "CategoriesPresent": [1]}})
            add(f"benchmark_RELEASE/dataset/cls/{name}.mat", file.getvalue())
            add(f"benchmark_RELEASE/dataset/inst/{name}.mat", b"of no interest")
        add("benchmark_RELEASE/dataset/cls/../../../../2008_000006.mat", b"outside")
    monkeypatch.setitem(download.ARCHIVES, "SBD", {"benchmark.tgz": download.md5(archive)})
    return root, names, masks, archive


def test_sbd_adds_its_masks_to_train_and_leaves_val_alone(sbd, tmp_path):
    original, names, masks, archive = sbd
    download.get_sbd(tmp_path / "data", tars=[archive])
    root = original.with_name("VOC2012-SBD")
    train, val = voc.Split(root, "train"), voc.Split(root, "val")
    assert train.ids == [*names[:2], *names[4:6]] and val.ids == names[2:4]
    assert np.array_equal(train.mask(2), masks[names[4]]) and np.array_equal(train.mask(3), masks[names[5]])
    for name in names[:4]:  # where both have a mask, VOC's is kept
        file = f"SegmentationClass/{name}.png"
        assert (root / file).read_bytes() == (original / file).read_bytes()
    assert download.verify(root) == 0 and not list(tmp_path.glob("*.mat")) and not list(root.parent.glob("*.unf*"))
    before = archive.stat()
    download.get_sbd(tmp_path / "data")  # there already: no network, no archive
    assert archive.stat() == before


def test_sbd_that_is_torn_or_lacks_a_photo_leaves_nothing(sbd, tmp_path, monkeypatch):
    original, names, _, archive = sbd
    (original / "JPEGImages" / f"{names[4]}.jpg").unlink()
    with pytest.raises(UserError, match=f"{names[4]}.jpg: is missing from VOC2012"):
        download.get_sbd(tmp_path / "data", tars=[archive])
    archive.write_bytes(archive.read_bytes()[:-200])
    monkeypatch.setitem(download.ARCHIVES, "SBD", {"benchmark.tgz": download.md5(archive)})
    with pytest.raises(UserError, match="any name.tgz: is not SBD's archive, or torn"):
        download.get_sbd(tmp_path / "data", tars=[archive])
    assert [path.name for path in original.parent.iterdir()] == ["VOC2012"]


def test_without_scipy_sbd_says_so(sbd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy"):
        download.get_sbd(tmp_path / "data", tars=[sbd[3]])
