"""`--sandbox` as a user runs it: the same results, and nothing else in reach."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import pytest
import rasterio

from rsedge.cli import sandbox
from rsedge.cli.main import cli, run
from rsedge.runtime.sandbox.landlock import landlock_abi
from rsedge.runtime.sandbox.seccomp import can_filter
from tests import scenes
from tests.dual_encoders import make_clip
from tests.safe_products import write_safe

COMMANDS = ("caption", "embed", "classify", "locate", "info", "bench")
needs_sandbox = pytest.mark.skipif(landlock_abi() < 1 or not can_filter(), reason="no Landlock or seccomp here")


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rsedge.export.convert import export

    folder = tmp_path_factory.mktemp("clip")
    return export(make_clip(folder / "model"), folder / "clip.rsedge").path


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Path:
    """A scene of 5 × 3 tiles of 32 px in a folder of its own, and folders ``free`` and ``out`` beside it."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "free", "out"):
        Path(name).mkdir()
    return scenes.write(Path("data/scene.tif"), scenes.pixels(3, 70, 150))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rsedge", *map(str, arguments)]


def rsedge(*arguments: object, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def both(arguments: Callable[[str], Sequence[object]], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command free, its outputs in ``free``, and in the sandbox, its outputs in ``out``; compare all files."""
    free = rsedge(*arguments("free"), stdin=stdin)
    confined = rsedge(*arguments("out"), "--sandbox", stdin=stdin)
    assert (free.returncode, confined.returncode) == (0, 0), free.stderr + confined.stderr
    assert "sandbox: files as named (Landlock" in confined.stderr
    assert "sandbox" not in free.stderr
    assert contents("out") == contents("free")
    return confined


def contents(folder: str) -> dict[str, bytes]:
    """Files of a folder, but for the record of the options, which are others."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.endswith(".toml")}
    return {name: data.replace(b"/out/", b"/free/") for name, data in files.items()}


def tiny(bundle: Path) -> list[object]:
    return ["-m", bundle, "--tile-size", 32, "--device", "cpu"]


@needs_sandbox
def test_captions_are_the_same_to_the_byte(scene, bundle_path):
    result = both(lambda folder: ["caption", scene, *tiny(bundle_path), "-o", f"{folder}/a.geojson"])
    assert {path.name for path in Path("out").iterdir()} == {"a.geojson", "a.geojson.config.toml", "a.qml"}
    assert f"no network and no other processes (seccomp); writes below {Path('out').resolve()}\n" in result.stderr
    assert result.stdout == ""
    assert "sandbox = true" in Path("out/a.geojson.config.toml").read_text()


@needs_sandbox
def test_every_output_works(scene, bundle_path, clip_path):
    def arguments(folder: str) -> list[object]:
        views = ["--html", f"{folder}/a.html", "--sheet", f"{folder}/a.png", "--stac", f"{folder}/a.json"]
        beside = ["--embed", f"{folder}/e.parquet", "--embedder", clip_path]
        return ["caption", scene, *tiny(bundle_path), "-o", f"{folder}/a.parquet", *views, *beside]

    both(arguments)
    assert len(contents("out")) == 5
    assert rsedge("caption", scene, *tiny(bundle_path), "-o", "out/a.gpkg", "--sandbox").returncode == 0
    assert Path("out/a.gpkg").stat().st_size > 0


@needs_sandbox
def test_every_command_works(scene, bundle_path, clip_path):
    Path("labels.txt").write_text("field\nwater\n")
    model = ["-m", clip_path, "--device", "cpu"]
    both(lambda folder: ["embed", scene, *tiny(clip_path), "-o", f"{folder}/a.parquet"])
    both(
        lambda folder: [
            *["classify", scene, *tiny(clip_path), "--labels", "labels.txt"],
            *["-o", f"{folder}/c.csv", "--raster", f"{folder}/c.tif"],
        ]
    )
    both(
        lambda folder: [
            *["locate", scene, *model, "--text", "a field", "--window", 32, "--stride", 16],
            *["-o", f"{folder}/h.tif", "--png", f"{folder}/h.png"],
        ]
    )
    told = [rsedge("info", scene, bundle_path, "--no-probe", *tiny(bundle_path), *more) for more in ([], ["--sandbox"])]
    assert [result.returncode for result in told] == [0, 0], told[1].stderr
    free, confined = (re.sub(r"[\d.]+ [MG]iB", "", result.stdout) for result in told)  # memory in use now
    assert confined == free
    assert "writes below its cache alone" in told[1].stderr
    quick = ["--batch-size", 1, "--rounds", 1, "--tiles", 2, "--json"]
    result = rsedge("bench", "--scene", scene, *tiny(bundle_path), *quick, "--sandbox")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["device"] == "cpu"


@needs_sandbox
@pytest.mark.parametrize("form", ["folder", "zip", "granule", "loose", "stac", "stdin", "pattern", "above", "link"])
def test_every_form_of_a_scene_works(scene, bundle_path, form):
    product = write_safe(Path("data"), seed=3, size=256, zipped=form == "zip")
    safe, stdin = product.path, None
    name: Path | str = safe
    if form == "granule":
        name = safe / product.granule
    elif form == "loose":
        Path("bands").mkdir()
        for band in ("B02", "B03", "B04", "SCL"):
            shutil.copy(safe / product.image(band), "bands")
        name = next(Path("bands").glob("*B04*"))
    elif form in ("stac", "stdin"):
        bands = {"red": "B04", "green": "B03", "blue": "B02"}
        base = "" if form == "stac" else f"{safe}/"
        assets = {colour: {"href": f"{base}{product.image(band)}"} for colour, band in bands.items()}
        item = {"type": "Feature", "stac_version": "1.0.0", "id": "one", "geometry": None, "properties": {}}
        text = json.dumps({**item, "links": [], "assets": assets})
        name, stdin = ("-", text) if form == "stdin" else (safe / "item.json", None)
        if form == "stac":
            name.write_text(text)
    elif form == "pattern":
        shutil.copy(scene, "data/other.tif")
        name = "dat*/*.tif"
    elif form == "above":
        name = Path("data")
    elif form == "link":
        name = Path("link.SAFE")
        name.symlink_to(safe)
    both(lambda folder: ["caption", name, *tiny(bundle_path), "-o", f"{folder}/a.geojson"], stdin)
    records = json.loads(Path("out/a.geojson").read_text())["features"]
    assert {record["properties"]["status"] for record in records} <= {"ok", "nodata", "cloud"}
    assert any(record["properties"]["status"] == "ok" for record in records)


@needs_sandbox
def test_masks_and_files_called_after_a_raster_are_in_reach(scene, bundle_path):
    scenes.write(Path("clouds.tif"), np.tile(np.uint8([0, 1]), (1, 70, 75)))
    world, image = Path("data/photo.tfw"), scenes.write(
        Path("data/photo.tif"), scenes.pixels(3, 64, 64), crs=None, transform=None
    )  # fmt: skip
    world.write_text("10\n0\n0\n-10\n600005\n5099995\n")
    both(lambda folder: ["caption", scene, *tiny(bundle_path), "-o", f"{folder}/a.csv", "--cloud-mask", "clouds.tif"])
    both(lambda folder: ["caption", image, *tiny(bundle_path), "-o", f"{folder}/b.csv"])


@needs_sandbox
def test_data_goes_to_stdout_and_a_default_output_needs_a_folder_of_its_own(scene, bundle_path, monkeypatch):
    free = rsedge("caption", scene, *tiny(bundle_path), "-o", "-")
    confined = rsedge("caption", scene, *tiny(bundle_path), "-o", "-", "--sandbox", "--json")
    assert confined.stdout == free.stdout
    assert json.loads(confined.stderr.strip().splitlines()[-1])["tiles"] == 15
    assert rsedge("caption", scene, *tiny(bundle_path), "--sandbox").returncode == 0
    assert Path("scene.geojson").exists()
    refused = rsedge("caption", scene, *tiny(bundle_path), "-o", "h.csv", "--sandbox", HOME=str(Path.cwd()))
    assert refused.returncode == 2
    assert f"{Path.cwd()} holds {Path.cwd()}: choose a separate folder" in refused.stderr
    assert not Path("h.csv").exists()
    warned = rsedge("caption", scene, *tiny(bundle_path), "-o", "out/h.csv", "--sandbox", HOME=str(Path.cwd() / "data"))
    assert "the sandbox can read all of" not in warned.stderr
    everything = ["caption", "data", *tiny(bundle_path), "-o", "out/i.csv", "--sandbox"]
    warned = rsedge(*everything, HOME=str(Path.cwd() / "data"))
    assert f"Warning: the sandbox can read all of {Path.cwd() / 'data'}: move the input" in warned.stderr


SPY = """
import atexit, os, sys
def look():
    found = {}
    for name in os.environ["LC_SPIED"].split(":"):
        try:
            with open(name, "rb") as stream:
                found[name] = stream.read(3)
        except OSError as error:
            found[name] = error.errno
    for name in os.environ["LC_PLANTED"].split(":"):
        try:
            open(name, "w").close()
        except OSError as error:
            found[name] = error.errno
    who = "child" if sys.argv[0] == "-c" else "parent"
    with open(f"out/{who}", "w") as stream:
        stream.write(repr((found, sorted(os.environ))))
atexit.register(look)
"""


@needs_sandbox
def test_code_in_the_child_reaches_nothing_else(scene, bundle_path):
    """What runs at the end of the process tries: in the parent it works, in the child it does not."""
    Path("spy").mkdir()
    Path("spy/sitecustomize.py").write_text(SPY)
    shutil.copy(scene, "data/secret.tif")
    paths = f"{Path.cwd() / 'spy'}:{Path(__file__).parents[2]}"
    spied = ["data/secret.tif", "/etc/passwd", str(scene), str(bundle_path / "manifest.json")]
    planted = ["data/planted", str(bundle_path / "planted"), "planted", "out/planted"]
    environment = {"PYTHONPATH": paths, "LC_SPIED": ":".join(spied), "LC_PLANTED": ":".join(planted)}
    secrets = {"AWS_SECRET_ACCESS_KEY": "s", "GDAL_HTTP_USERPWD": "s", "HF_TOKEN": "s", "GDAL_CACHEMAX": "64"}
    arguments = ["caption", scene, *tiny(bundle_path), "-o", "out/a.geojson", "--sandbox"]
    result = rsedge(*arguments, **environment, **secrets)
    (bundle_path / "planted").unlink()  # the parent could
    assert result.returncode == 0, result.stderr
    found, names = eval(Path("out/parent").read_text())
    assert {name: type(value) for name, value in found.items()} == dict.fromkeys(spied, bytes)
    assert set(secrets) <= set(names)
    found, names = eval(Path("out/child").read_text())
    assert [type(found.get(name)) for name in spied] == [int, int, bytes, bytes]
    assert {name: found.get(name) for name in (*spied[:2], *planted)} == {
        **dict.fromkeys((*spied[:2], *planted[:3]), 13),
        "out/planted": None,
    }
    assert set(secrets) & set(names) == {"GDAL_CACHEMAX"}
    assert not any(name.startswith("RSEDGE_SANDBOX") for name in names)


@needs_sandbox
def test_modules_in_the_working_folder_are_not_imported(scene, bundle_path):
    for name in ("numpy", "json", "rasterio"):
        Path(f"{name}.py").write_text(f"open('owned-{name}', 'w')")
    start = "import sys; sys.path.remove(''); from rsedge.cli.main import main; main()"
    arguments = ["caption", str(scene), *map(str, tiny(bundle_path)), "-o", "out/a.csv", "--sandbox"]
    result = subprocess.run([sys.executable, "-c", start, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert list(Path().glob("owned*")) == []


@needs_sandbox
def test_exit_codes_and_errors_are_the_childs(scene, bundle_path):
    scenes.truncate(scenes.write(Path("data/cut.tif"), scenes.pixels(3, 700, 150)), 0.5)
    base = ["caption", *tiny(bundle_path), "-o", "out/a.csv", "--overwrite", "--sandbox"]
    for path, code, message in (
        ("nope.tif", 1, "nope.tif"),
        ("data/cut.tif", 3, "unreadable"),
        ("https://example.org/a.tif", 2, "--allow-remote"),
    ):
        result = rsedge(*base, path)
        assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
        assert message in result.stderr
    result = rsedge("--debug", *base, "nope.tif")
    assert "Traceback" in result.stderr
    assert "nope.tif" in result.stderr
    quiet = rsedge("-q", *base, scene, "--overwrite")
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_it_goes_with_no_network(name, capsys):
    others = {
        "bench": ["--scene", "a.tif"],
        "classify": ["a.tif", "--labels", "a,b"],
        "locate": ["a.tif", "--text", "a"],
        "embed": ["a.tif", "-o", "a.parquet"],
    }
    assert run([name, *others.get(name, ["a.tif"]), "--sandbox", "--allow-remote"]) == 2
    assert "download scenes first, or leave one out" in capsys.readouterr().err


def test_where_it_cannot_be_had_nothing_is_read(scene, bundle_path, monkeypatch, capsys):
    from rsedge.runtime.sandbox import process as runtime

    monkeypatch.setattr(runtime, "landlock_abi", lambda: 0)
    assert run(["caption", str(scene), *map(str, tiny(bundle_path)), "-o", "out/a.csv", "--sandbox"]) == 1
    assert "Error: the sandbox cannot be had: this kernel has no Landlock" in capsys.readouterr().err
    assert list(Path("out").iterdir()) == []


def large(path: str) -> Path:
    data = np.random.default_rng(0).integers(0, 255, (3, 32 * 30, 32 * 40), dtype=np.uint8)
    return scenes.write(Path(path), data)


def start(arguments: Sequence[object], segments: int) -> subprocess.Popen[str]:
    """A run that has finished some segments of its 19."""
    process = subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        # Started in the background of a shell, the tests would hand down that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal, deadline = Path("out/a.geojson.journal"), time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > segments):
        time.sleep(0.005)
    return process


def child_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@needs_sandbox
def test_stopped_in_every_way_the_same_command_completes_to_the_same_bytes(scene, bundle_path):
    options = [*tiny(bundle_path), "--beams", "2"]
    arguments = ["caption", large("data/large.tif"), *options, "-o", "out/a.geojson", "--sandbox"]
    assert rsedge(*arguments[:-3], "-o", "free/a.geojson").returncode == 0

    process = start(arguments, 1)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 130, talk
    assert "the same command continues from there" in talk
    assert "Traceback" not in talk

    process = start(arguments, 3)
    process.send_signal(signal.SIGTERM)
    assert (process.wait(60), process.stderr.read().count("Error")) == (130, 0)

    process = start(arguments, 5)
    os.kill(child_of(process), signal.SIGKILL)
    _, talk = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: SIGKILL ended the process in the sandbox (Linux sends it when memory runs out)" in talk

    process = start(arguments, 7)
    child = child_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists(), "the child ends with its parent"

    assert rsedge(*arguments).returncode == 0
    assert contents("out") == contents("free")


def test_a_signal_of_the_terminal_reaches_the_child_once():
    """It goes to parent and child, and the parent must not send it on; one sent to the parent alone it must."""
    child = """
    import signal, sys, time
    count = 0
    def received(*_):
        global count
        count += 1
    signal.signal(signal.SIGINT, received)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    print("ready", flush=True)
    for wanted in (1, 2):
        while count < wanted:
            time.sleep(0.01)
        time.sleep(0.5)
        print("received", count, flush=True)
    sys.exit(7)
    """
    code = f"""
    import os, pty, signal, sys
    pid, terminal = pty.fork()
    if pid == 0:
        from rsedge.cli.sandbox import _wait
        os._exit(_wait([sys.executable, "-c", {textwrap.dedent(child)!r}], os.environ))
    lines = os.fdopen(terminal, "r")
    print(lines.readline())
    os.write(terminal, bytes([3]))
    print(lines.readline())
    os.kill(pid, signal.SIGINT)
    print(lines.readline())
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 7, result.stderr
    assert result.stdout.replace("^C", "").split() == ["ready", "received", "1", "received", "2"]


def test_every_option_is_known_to_name_files_or_not():
    """A new option that names files has to be given to the sandbox, or the run cannot open them."""
    no_files = {
        *("aoi", "allow_hosts", "allow_remote", "allow_vrt", "as_json", "backend", "bands", "batch_size", "boa_offset"),
        *("config", "contrasts", "device", "dtype", "edge", "ensemble", "file_format", "kind", "max_cloud"),
        *("max_nodata", "max_pixels", "no_probe", "nodata", "overlap", "overwrite", "pixel_values", "readers"),
        *("resolution", "sandbox", "stride", "style", "templates", "texts", "threads", "tile_size", "top", "window"),
        *("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "early_stopping", "repetition_penalty"),
        *("no_repeat_ngram_size", "top_p", "top_k", "temperature", "seed", "batch_sizes", "rounds", "seconds", "tiles"),
    }  # config is read before, by the parent and by the child
    files = {*sandbox.INPUTS, *sandbox.FILES_READ, *sandbox.OUTPUTS}
    no_files |= {"also", "shard", "retry_failed", "redo_stale", "max_failures", "dry_run"}  # of batch
    for name in (*COMMANDS, "batch"):
        parameters = {str(parameter.name) for parameter in cli.get_command(click.Context(cli), name).params}
        assert "sandbox" in parameters
        assert parameters - no_files - files == set(), name
    all_commands = {name: cli.get_command(click.Context(cli), name) for name in cli.list_commands(click.Context(cli))}
    reading = [name for name, found in all_commands.items() if any(p.name == "allow_remote" for p in found.params)]
    assert sorted(reading) == sorted((*COMMANDS, "batch"))


def test_links_of_strangers_widen_nothing(tmp_path, monkeypatch):
    """What lies beside an input or matches a pattern was not named by the user, and may be a link to anywhere."""
    home = tmp_path / "home"
    (tmp_path / "data" / "R10m").mkdir(parents=True)
    home.mkdir()
    monkeypatch.chdir(tmp_path / "data")
    Path("R20m").symlink_to(home)
    Path("link").symlink_to(home)
    Path("scene.tif").touch()
    for name in ("R10m", "*", "**"):
        assert not [path for path in sandbox.of_input([name]) if path.resolve() == home], name
    Path("R10m/x_B04.tif").touch()
    assert not [path for path in sandbox._listed(["R10m/x_B04.tif"]) if path.resolve() == home]
    assert tmp_path / "data" / "scene.tif" in set(sandbox.of_input(["*"]))


def test_what_is_read_for_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/scene.tif", "a/scene.tif.aux.xml", "a/scene.tfw", "a/scenery.tif", "a/item.json", "a/x.zip"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("a/scene.ovr").symlink_to("/etc/passwd")
    inside = Path("P.SAFE/GRANULE/L2A/IMG_DATA/R10m")
    inside.mkdir(parents=True)
    Path("R10m").mkdir()

    def read(*names: str) -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in sandbox.of_input(names)}

    assert read("a/scene.tif") == {"a/scene.tif", "a/scene.tif.aux.xml", "a/scene.tfw"}
    assert read("a/*.tif") == read("a/scene.tif") | {"a/scenery.tif"}
    assert read("a/item.json") == read("a") == {"a"}
    assert read("a/x.zip") == {"a/x.zip"}
    assert read(str(inside)) == {"P.SAFE", "P.SAFE/GRANULE/L2A/IMG_DATA/R20m"}
    assert read("R10m") == {"R10m", "R20m"}
    assert read("-") == {"."}
    assert read("nothing.tif", "https://example.org/a.tif", "/vsizip/a/x.zip/y.tif") == set()
    with rasterio.open(scenes.write(Path("b4.tif"), scenes.pixels(1, 8, 8))):
        assert read("b4.tif") == {"b4.tif"}


@pytest.mark.parametrize(
    ("landlock", "seccomp", "told"),
    [
        (7, True, "yes: files by Landlock 7, network by seccomp"),
        (1, False, "yes: files by Landlock 1, network by a name space, where that is allowed"),
        (0, True, "no: this kernel has no Landlock"),
    ],
)
def test_doctor_says_whether_it_can_be_had(landlock, seccomp, told):
    from rsedge.cli.doctor import _sandbox
    from rsedge.runtime.sandbox.process import Support

    ((name, text),) = _sandbox(Support(landlock=landlock, seccomp=seccomp))
    assert (name, text.partition(" (")[0]) == ("--sandbox", told)
