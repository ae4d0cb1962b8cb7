"""The suite uploaded file by file into one folder, as Colab's file pane does, with and without ctclip.zip.

Reference: the files that git lists, and the lines a user reads. Whether the five cells run from such a folder is
tested in test_notebook.py.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import ctclip_setup
from ctclip.environment import bundle
from ctclip.environment.packages import SetupError

ROOT = Path(__file__).resolve().parent.parent
THIRD_PARTY = ("torch", "numpy", "pandas", "sklearn", "scipy")
CODE = ("ctclip_training.py", "ctclip_evaluation.py", "run_task2.py")


@pytest.fixture(scope="module")
def zip_file(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "ctclip.zip"
    bundle.write_bundle(target)
    return target


@pytest.fixture
def upload(tmp_path, zip_file):
    """A folder with the bundle and nothing else."""
    shutil.copy(zip_file, tmp_path)
    return tmp_path


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"ctclip.zip"}


def changed(zip_file, target, **contents):
    """A copy of the bundle; `contents`: stem of a name -> its new content, None to leave it out."""
    with zipfile.ZipFile(zip_file) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = contents.get(Path(entry.filename).stem, old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return target


def another_bundle(upload, monkeypatch, **contents):
    """Puts the bundle of a later version into the folder; `contents`: as `changed` takes them."""
    with zipfile.ZipFile(changed(upload / "ctclip.zip", upload / "later.zip", **contents)) as file:
        file.extractall(upload / "later")
    monkeypatch.setattr(bundle, "__version__", "9.9")
    bundle.write_bundle(upload / "ctclip.zip", upload / "later")
    shutil.rmtree(upload / "later")
    (upload / "later.zip").unlink()


def refused(folder, capsys):
    """The line that unpacking ends with."""
    before = files_in(folder)
    with pytest.raises(SystemExit) as caught:
        ctclip_setup.unpack_bundle(folder)
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.err.count("\n") == 1 and said.err.startswith("error: ")
    assert files_in(folder) == before and not (folder.parent / "evil.py").exists()
    return said.err


# ---- what is in a bundle


def test_the_bundle_holds_the_package_the_scripts_and_the_demo(zip_file):
    listed = subprocess.run(["git", "ls-files", "ctclip"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert len(listed) > 60
    with zipfile.ZipFile(zip_file) as file:
        names = file.namelist()
    others = {"models/ctclip_demo.pt", "requirements.txt", "LICENSE", bundle.STAMP}
    assert set(names) == {*listed, *bundle.SCRIPTS, *others} and names == sorted(names)
    assert zip_file.stat().st_size < 6_000_000 and ctclip_setup.STAMP == bundle.STAMP


def test_the_same_files_give_the_same_bytes(upload, zip_file):
    """From another folder, unpacked at another time."""
    ctclip_setup.unpack_bundle(upload)
    for path in upload.rglob("*.py"):
        os.utime(path, (1, 1))
    again = upload / "again.zip"
    bundle.write_bundle(again, upload)
    assert again.read_bytes() == zip_file.read_bytes()
    assert not list(upload.glob("*.tmp"))


def test_every_file_of_the_package_is_expected_but_what_trains_the_demo():
    listed = subprocess.run(["git", "ls-files", "ctclip"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    expected = {path.relative_to(ROOT).as_posix() for path in bundle.expected_files(ROOT)}
    assert set(listed) - expected == {"ctclip/phantoms/pretrain_demo.py"}
    assert expected - set(listed) == {*bundle.SCRIPTS, "models/ctclip_demo.pt"}
    assert bundle.missing_files(ROOT) == []


# ---- unpacking


def test_one_upload_becomes_the_suite(upload, capsys):
    assert ctclip_setup.unpack_bundle(upload)  # ctclip_setup.py is another one now: there was none
    with zipfile.ZipFile(upload / "ctclip.zip") as file:
        names = file.namelist()
        assert files_in(upload) == set(names)
        assert all((upload / name).read_bytes() == file.read(name) for name in names)
    said = capsys.readouterr().out
    assert said.startswith(f"bundle      {len(names)} of {len(names)} files of ctclip.zip unpacked (0.")
    assert bundle.missing_files(upload) == []

    assert not ctclip_setup.unpack_bundle(upload)
    assert capsys.readouterr().out == ""


def test_what_is_missing_is_restored_and_what_was_changed_is_left(upload, capsys):
    ctclip_setup.unpack_bundle(upload)
    (upload / "run_task2.py").write_text("# mine")
    (upload / "ctclip" / "cli.py").write_text("# mine")
    (upload / "ctclip" / "evaluation" / "report.html").unlink()
    capsys.readouterr()
    ctclip_setup.unpack_bundle(upload)
    said = re.fullmatch(r"bundle +1 of (\d+) files of ctclip.zip unpacked \(.*\), (\d+) were here\n",
                        capsys.readouterr().out)
    assert said and int(said[1]) == int(said[2]) + 1
    assert (upload / "ctclip" / "evaluation" / "report.html").is_file()
    assert (upload / "run_task2.py").read_text() == (upload / "ctclip" / "cli.py").read_text() == "# mine"


def test_a_package_that_is_no_bundles_is_left_as_it_is(upload, capsys):
    own = upload / "ctclip" / "mine.py"
    own.parent.mkdir()
    own.write_text("x = 1")
    assert not ctclip_setup.unpack_bundle(upload)
    assert files_in(upload) == {"ctclip/mine.py"}
    assert "ctclip.zip is not used: a folder ctclip is here already" in capsys.readouterr().out
    (upload / "pyproject.toml").touch()  # a checkout in which the bundle was made
    assert not ctclip_setup.unpack_bundle(upload)
    assert files_in(upload) == {"ctclip/mine.py", "pyproject.toml"} and capsys.readouterr().out == ""


def test_another_bundle_replaces_the_one_before_and_loses_nothing(upload, monkeypatch, capsys):
    ctclip_setup.unpack_bundle(upload)
    (upload / "ctclip" / "cli.py").write_text("# mine")
    (upload / "results").mkdir()
    another_bundle(upload, monkeypatch, run_task2=b"# new")
    capsys.readouterr()
    assert not ctclip_setup.unpack_bundle(upload)
    said = capsys.readouterr().out
    assert re.search(r"another bundle \(9\.9 [0-9a-f]{12}\): the folder ctclip is kept as ctclip.before\n", said)
    assert "run_task2.py was another one than the bundle's; it is kept as run_task2.before.py\n" in said
    assert (upload / "ctclip.before" / "cli.py").read_text() == "# mine"
    assert (upload / "ctclip" / "cli.py").read_bytes() == (ROOT / "ctclip" / "cli.py").read_bytes()
    assert (upload / "run_task2.py").read_text() == "# new"
    assert (upload / "run_task2.before.py").read_bytes() == (ROOT / "run_task2.py").read_bytes()
    assert not ctclip_setup.unpack_bundle(upload) and capsys.readouterr().out == ""


def test_a_kill_while_unpacking_is_made_good_by_the_next_run(upload, monkeypatch, capsys):
    """At the first file, at the stamp, and in the package."""
    with zipfile.ZipFile(upload / "ctclip.zip") as file:
        names = set(file.namelist())
    replace = os.replace
    for writes in (0, 8, 30):
        left = [writes]

        def killed(source, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(ctclip_setup.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ctclip_setup.unpack_bundle(upload)
        assert bundle.missing_files(upload)
    monkeypatch.setattr(ctclip_setup.os, "replace", replace)
    ctclip_setup.unpack_bundle(upload)
    assert {name for name in files_in(upload) if not name.endswith(".tmp")} == names
    assert "not used" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [
    "../evil.py", "/tmp/evil.py", "ctclip/../../evil.py", "ctclip\\..\\..\\evil.py", "torch.py", "ctclip/evil.so",
    "models/ctclip_classfine.pt", "__MACOSX/ctclip/x.py", ".ssh/config", "C:/evil.py",
])  # fmt: skip
def test_a_name_that_is_not_the_suites_is_refused(upload, capsys, name):
    with zipfile.ZipFile(upload / "ctclip.zip", "a") as file:
        file.writestr(zipfile.ZipInfo(name), "raise SystemExit('evil')")
    assert "in it, which is no file of the suite, expected the file that --bundle writes" in refused(upload, capsys)


def test_a_damaged_bundle_is_one_line(upload, zip_file, capsys):
    whole = zip_file.read_bytes()
    with zipfile.ZipFile(zip_file) as file:
        start = file.getinfo("ctclip/cli.py").header_offset
    bad_crc = whole[: start + 200] + bytes([whole[start + 200] ^ 0xFF]) + whole[start + 201 :]
    for content in (b"", b"<html>", whole[:-1000], whole[:5000], whole[3000:], bad_crc):
        (upload / "ctclip.zip").write_bytes(content)
        assert "upload it again, or delete it" in refused(upload, capsys)
    for stem, found in {"bundle": "another zip file", "loop": "files that are not those it was made of"}.items():
        changed(zip_file, upload / "ctclip.zip", **{stem: None})
        assert f"found {found}, expected the file that --bundle writes" in refused(upload, capsys)


def test_a_bundle_that_unpacks_without_end_is_refused(upload, zip_file, monkeypatch, capsys):
    monkeypatch.setattr(ctclip_setup, "MOST_BYTES", 1_000_000)
    assert "found another zip file" in refused(upload, capsys)


def test_a_full_disk_is_one_line(upload, monkeypatch, capsys):
    def full(*names):
        raise OSError(28, "No space left on device", str(upload / "LICENSE"))

    monkeypatch.setattr(ctclip_setup.os, "replace", full)
    with pytest.raises(SystemExit):
        ctclip_setup.unpack_bundle(upload)
    assert "LICENSE: No space left on device; unpack ctclip.zip in a folder with space" in capsys.readouterr().err


def test_unpacking_is_written_for_the_oldest_interpreter():
    """So that 3.8 gets as far as its one line; its syntax is what can be checked here."""
    ast.parse((ROOT / "ctclip_setup.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    ast.parse((ROOT / "ctclip" / "environment" / "bundle.py").read_text(encoding="utf-8"), feature_version=(3, 8))


# ---- a file that is missing is named


def test_demo_weights_beside_the_scripts_are_put_where_they_belong(upload, capsys):
    ctclip_setup.unpack_bundle(upload)
    os.replace(upload / "models" / "ctclip_demo.pt", upload / "ctclip_demo.pt")
    (upload / "models").rmdir()
    bundle.files_step(upload)
    assert (upload / "models" / "ctclip_demo.pt").is_file() and not (upload / "ctclip_demo.pt").exists()
    assert "ctclip_demo.pt moved to models/, where the scripts look for it" in capsys.readouterr().out


@pytest.mark.parametrize("name", [
    "models/ctclip_demo.pt", "ctclip/evaluation/report.html", "ctclip/hub/model_card.md", "ctclip/training/loop.py",
    "ctclip/environment/setup.py", "ctclip/data/__init__.py", "ctclip_model.py", "ctclip/phantoms/__main__.py",
])  # fmt: skip
def test_a_missing_file_stops_setup_and_bundle_with_its_name(upload, name):
    ctclip_setup.unpack_bundle(upload)
    (upload / name).unlink()
    for step in (bundle.files_step, lambda folder: bundle.write_bundle(folder / "new.zip", folder)):
        with pytest.raises(SetupError) as caught:
            step(upload)
        assert str(caught.value).startswith(f"found no {name} in {upload}, expected every file of the suite; put a ")
    assert not (upload / "new.zip").exists()


def test_an_installed_package_makes_no_bundle(upload):
    ctclip_setup.unpack_bundle(upload)
    (upload / "requirements.txt").unlink()
    with pytest.raises(SetupError, match="found no requirements.txt in .*, expected a checkout or an unpacked bundle"):
        bundle.write_bundle(upload / "new.zip", upload)
    assert not (upload / "new.zip").exists()


def test_many_missing_files_are_counted(upload):
    ctclip_setup.unpack_bundle(upload)
    shutil.rmtree(upload / "ctclip" / "data")
    with pytest.raises(SetupError, match=r"found no ctclip/data/__init__.py, ctclip/data/\S+, .* and \d+ more in"):
        bundle.files_step(upload)


def run(folder, script, *arguments, packages=""):
    """`packages`: the folder that they are in. An installed copy of this project must not help: -S, no .pth files."""
    command = [sys.executable, "-S", "-c", START.format(path=str(folder / script)), *arguments]
    environment = os.environ | {"PYTHONPATH": packages}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)


START = "import runpy, sys; sys.argv[0] = {path!r}; sys.path[:1] = []; runpy.run_path({path!r}, run_name='__main__')"


@pytest.mark.parametrize("script", [*CODE, "ctclip_setup.py", "ctclip_model.py"])
def test_a_script_uploaded_alone_says_what_is_missing(tmp_path, script):
    """Without packages either, as on a fresh interpreter."""
    shutil.copy(ROOT / script, tmp_path)
    done = run(tmp_path, script)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "python ctclip_setup.py" in done.stderr or script == "ctclip_setup.py"
    missing = "torch" if script == "ctclip_model.py" else "ctclip"
    assert done.stderr.startswith(f"error: No module named '{missing}', expected ")
    if script != "ctclip_model.py":
        assert "ctclip.zip" in done.stderr


@pytest.mark.parametrize("missing", ["a package", "ctclip_model"])
def test_scripts_without_packages_or_without_the_model_say_so(upload, missing):
    """What is imported after the flags."""
    ctclip_setup.unpack_bundle(upload)
    (upload / "ctclip_model.py").unlink()
    packages = str(Path(torch.__file__).parents[1]) if missing == "ctclip_model" else ""
    done = run(upload, "ctclip_evaluation.py", "--example", packages=packages)
    named = re.fullmatch(r"error: No module named '(\w+)', expected every file and package of the suite; run python "
                         r"ctclip_setup.py, which mends or names them\n", done.stderr)  # fmt: skip
    assert done.returncode == 2 and named and (named[1] == missing if packages else named[1] in THIRD_PARTY)
    help_text = run(upload, "ctclip_evaluation.py", "--help")
    assert help_text.returncode == 0 and "--example" in help_text.stdout


def test_setup_flags_beside_bundle_are_refused():
    with pytest.raises(SetupError, match="found --bundle --dev, expected --bundle alone"):
        ctclip_setup.parse_options(["--bundle", "--dev"])
