"""download.py against a local server that fails in the ways of real ones, hostile archives, and SBD."""

import contextlib
import hashlib
import http.server
import io
import os
import signal
import sys
import tarfile
import threading
import time
from unittest import mock

import numpy as np
import pytest
import scipy.io
from conftest import make_tiny, run_main
from PIL import Image

import download
import voc
from seg import report, signals
from util import UserError

TRAINVAL, TEST = "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``. The first part of a path is a behaviour; ``requests`` records (behaviour, name, Range)."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.stop = files, [], threading.Event()
        self.base = f"http://127.0.0.1:{self.server_address[1]}"

    def ranges(self, behaviour):
        """The Range headers of the requests for the first archive."""
        return [header for kind, name, header in self.requests if (kind, name) == (behaviour, TRAINVAL)]


class Handler(http.server.BaseHTTPRequestHandler):
    log_message = mock.Mock()  # prints nothing

    def do_GET(self):
        behaviour, name = self.path.strip("/").split("/")[0], self.path.rsplit("/", 1)[1]
        header = self.headers.get("Range")
        self.server.requests.append((behaviour, name, header))
        if behaviour == "hang":
            self.server.stop.wait(20)
        if behaviour == "missing":
            return self.send_error(404)
        if behaviour == "moved":
            self.send_response(302)
            self.send_header("Location", f"{self.server.base}/good/{name}")
            return self.end_headers()
        content = self.server.files[name]
        start = int(header.removeprefix("bytes=").removesuffix("-")) if header and behaviour != "norange" else 0
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


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def archives(tmp_path):
    """The bytes of two archives like VOC2007's, the second with the test split, from the tiny set."""
    root = make_tiny(tmp_path / "source" / "VOC2007")
    contents = {}
    for name in (TRAINVAL, TEST):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path in sorted(root.rglob("*")):
                if path.is_file() and (path.name == "test.txt") == (name == TEST):
                    tar.add(path, f"VOCdevkit/VOC2007/{path.relative_to(root)}")
        contents[name] = buffer.getvalue()
    return contents


@pytest.fixture
def server(archives, monkeypatch):
    monkeypatch.setitem(download.ARCHIVES, 2007, {name: md5(content) for name, content in archives.items()})
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server = Server(archives)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def get_voc(server, out, *behaviours, mirrors=()):
    """Download VOC2007 into ``out`` from mirrors with these behaviours; return its folder."""
    urls = [f"{server.base}/{behaviour}/voc{{year}}/{{name}}" for behaviour in behaviours]
    with mock.patch.object(download, "MIRRORS", urls):
        download.get_voc(2007, out, mirrors, on_disk={})
    return out / "VOCdevkit" / "VOC2007"


@pytest.mark.parametrize("behaviour", ["stall", "hang"])
def test_a_signal_stops_a_download_after_the_current_attempt(server, out, monkeypatch, behaviour):
    monkeypatch.setattr(download, "TIMEOUT", 1)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    with signals.handled(), pytest.raises(SystemExit, match="143"):
        get_voc(server, out, behaviour, "good")
    assert time.monotonic() - start < 5 and len(server.requests) == 1
    get_voc(server, out, "good")
    assert bool(server.ranges("good")[0] != "bytes=0-") == (behaviour == "stall")  # goes on with what has arrived


def test_a_downloaded_dataset_is_complete_and_not_downloaded_again(server, out, capsys):
    root = get_voc(server, out, "good")
    assert [len(voc.Split(root, name)) for name in ("train", "val", "test")] == [5, 4, 3]
    voc.check(root)
    assert [path.name for path in root.parent.iterdir()] == ["VOC2007"]  # no unfinished folder is left
    num_requests = len(server.requests)
    get_voc(server, out, "good")
    assert len(server.requests) == num_requests and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("behaviour", ["truncate", "stall"])
def test_a_lost_connection_is_continued_where_it_stopped(server, out, behaviour):
    get_voc(server, out, behaviour)
    third = len(server.files[TRAINVAL]) // 3
    assert server.ranges(behaviour)[:3] == ["bytes=0-", f"bytes={third}-", f"bytes={2 * third}-"]


@pytest.mark.parametrize(
    ("part", "requests"),
    [
        (lambda content: content[:1000], ["bytes=1000-"]),
        (lambda content: content, []),
        (lambda content: b"x" * 1000, ["bytes=1000-", "bytes=0-"]),  # the MD5 is wrong: once more from the start
        (lambda content: content + b"x", ["bytes={}-", "bytes=0-"]),  # the server answers 416
    ],
    ids=["incomplete", "complete", "damaged", "too long"],
)
def test_an_earlier_download_is_continued(server, out, part, requests):
    earlier = part(server.files[TRAINVAL])
    (out / TRAINVAL).write_bytes(earlier)
    get_voc(server, out, "good")
    assert server.ranges("good") == [header.format(len(earlier)) for header in requests]


def test_mirrors_are_tried_in_order_those_of_the_command_line_first(server, out):
    get_voc(server, out, "corrupt", "norange", "moved", mirrors=[f"{server.base}/missing/"])
    behaviours = [behaviour for behaviour, name, _ in server.requests if name == TRAINVAL]
    assert list(dict.fromkeys(behaviours)) == ["missing", "corrupt", "norange", "moved", "good"]
    assert server.ranges("good") == [f"bytes={len(server.files[TRAINVAL]) // 3}-"]  # continues what "norange" sent


def test_if_all_mirrors_fail_the_message_names_each_with_its_reason(server, out):
    with pytest.raises(UserError) as error:
        get_voc(server, out, "missing", "corrupt", mirrors=["http://127.0.0.1:1"])  # a port without a server
    first, *reasons, advice = str(error.value).splitlines()
    expected = [("127.0.0.1:1/", "refused"), ("missing/voc2007", "Not Found"), ("corrupt/voc2007", "MD5 is wrong")]
    assert len(reasons) == 3 and all(url in line and why in line for line, (url, why) in zip(reasons, expected))
    assert TRAINVAL in first and "--tar" in advice and "--toy" in advice
    assert not (out / "VOCdevkit" / "VOC2007").exists()


def test_archives_on_disk_need_no_network_and_may_have_any_name(server, tmp_path, out, capsys):
    paths = [tmp_path / "a copy.tar", tmp_path / "b.tar"]
    for path, content in zip(paths, server.files.values()):
        path.write_bytes(content[:-1])  # incomplete
        assert run_main(tmp_path, download, f"--tar '{path.name}'") == 2
        assert capsys.readouterr().err.startswith(f"error: --tar {path.name}: its MD5 is not that of VOCtrainval_")
        path.write_bytes(content)
    assert run_main(tmp_path, download, "--tar b.tar --tar 'a copy.tar'") == 0
    assert len(voc.Split(out / "VOCdevkit" / "VOC2007", "test")) == 3
    assert not server.requests and all(path.exists() for path in paths)


def test_an_incomplete_dataset_is_named(server, out):
    make_tiny(out / "VOCdevkit" / "VOC2007", (("train", 1), ("val", 1)))
    with pytest.raises(UserError, match="VOC2007: exists, but without ImageSets/Segmentation/test.txt"):
        get_voc(server, out, "good")


def test_a_dataset_gets_its_name_only_when_it_is_complete(tmp_path, archives, monkeypatch):
    (tmp_path / "complete.tar").write_bytes(archives[TRAINVAL])
    root, stale = tmp_path / "VOC2007", tmp_path / "VOC2007.unfinished" / "JPEGImages" / "stale.jpg"
    stale.parent.mkdir(parents=True)
    stale.touch()  # by a process that was killed
    existed = []
    progress = report.progress
    monkeypatch.setattr(report, "progress", lambda *args: (existed.append(root.exists()) or _ for _ in progress(*args)))
    download.unpack([tmp_path / "complete.tar"], root)
    assert existed and not any(existed)
    voc.check(root)
    assert not (root / "JPEGImages" / "stale.jpg").exists() and not stale.exists()


def test_sbd_adds_masks_to_train_and_keeps_val(out, tmp_path, monkeypatch, capsys):
    """VOC2012 has three photos without masks; SBD has masks of one of train, of both of val and of two of these."""
    voc2012 = make_tiny(out / "VOCdevkit" / "VOC2012", (("train", 2), ("val", 2)))
    names = [f"{index:06d}" for index in range(7)]
    for name in names[4:]:
        Image.new("RGB", (40, 30)).save(voc2012 / "JPEGImages" / f"{name}.jpg")
    masks = {name: np.full((30, 40), 7 + index, np.uint8) for index, name in enumerate(names)}
    with tarfile.open(tmp_path / "any name.tgz", "w:gz") as tar:
        for name in names[1:6]:
            file = io.BytesIO()
            scipy.io.savemat(file, {"GTcls": {"Segmentation": masks[name], "CategoriesPresent": [1]}})
            for path, content in ((f"cls/{name}.mat", file.getvalue()), (f"inst/{name}.mat", b"not needed")):
                member = tarfile.TarInfo(f"benchmark_RELEASE/dataset/{path}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    checksum = md5((tmp_path / "any name.tgz").read_bytes())
    monkeypatch.setitem(download.ARCHIVES, "SBD", {"benchmark.tgz": checksum})
    before = {path: path.read_bytes() for path in voc2012.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.io", None)
        assert run_main(tmp_path, download, "--sbd --tar 'any name.tgz'") == 2
    assert "pip install scipy" in capsys.readouterr().err
    assert run_main(tmp_path, download, "--sbd --tar 'any name.tgz'") == 0
    root = out / "VOCdevkit" / "VOC2012-SBD"
    train, val = voc.Split(root, "train"), voc.Split(root, "val")
    assert train.ids == [*names[:2], *names[4:6]] and val.ids == names[2:4]
    assert np.array_equal(train.mask(2), masks[names[4]]) and np.array_equal(train.mask(3), masks[names[5]])
    for name in names[:4]:  # if both have a mask, VOC's is kept
        path = f"SegmentationClass/{name}.png"
        assert (root / path).read_bytes() == (voc2012 / path).read_bytes()
    assert {path: path.read_bytes() for path in before} == before
    voc.check(root)
    assert run_main(tmp_path, download, "--sbd") == 0 and "nothing to do" in capsys.readouterr().out
