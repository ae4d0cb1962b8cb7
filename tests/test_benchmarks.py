"""The benchmarks themselves: every script starts, and the table of all of them has a line for each, whatever happens to
a script. The scripts of the table are small ones made here."""

import ast
import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "tests" / "benchmarks").glob("*.py"))


@pytest.fixture
def benchmarks_path(monkeypatch):
    """The folder of the scripts on the path, as where one is started; they put the project there."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS[0].parent), *sys.path])


def test_every_script_shows_its_flags(benchmarks_path, monkeypatch, capsys):
    """--help: it can be imported, and its flags parse."""
    helpers = {"rows", "astra"}  # have no flags
    assert len(SCRIPTS) > 20 and helpers < {script.stem for script in SCRIPTS}
    for script in SCRIPTS:
        if script.stem in helpers:
            importlib.import_module(script.stem)
            continue
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        assert end.value.code == 0, script.name
        assert "usage:" in capsys.readouterr().out, script.name


def test_every_script_imports_names_that_there_are(benchmarks_path):
    """In functions too, which run after minutes."""
    found = [
        (script.name, node.module, alias.name)
        for script in SCRIPTS
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert any(script == "stream.py" and module == "ctclip.hub.streaming" for script, module, _ in found)
    for script, module, name in found:
        inside = importlib.import_module(module)
        assert hasattr(inside, name) or importlib.util.find_spec(f"{module}.{name}"), f"{script}: {module}.{name}"


ROW = {"goal": 2.0, "unit": "x", "detail": "", "checked": "", "sound": True, "at_least": False}
WRITES = f"""
import json, os, signal, sys, time
from pathlib import Path
def write(**fields):
    Path(sys.argv[2]).write_text(json.dumps([{ROW!r} | fields]))
"""
FAKES = {
    "good": "write(what='a ratio', measured=1.3)",
    "worse": "write(what='another ratio', measured=1.12)",
    "slower": "write(what='a rate', measured=7.0, goal=3.0, unit=' per second', at_least=True)",
    "noisy": "write(what='seconds', measured=1.2, unit=' s')",
    "new": "write(what='not there before', measured=1.0)",
    "failing": "write(what='too much', measured=3.0); sys.exit(1)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "raising": "print('a word before', file=sys.stderr); raise MemoryError('of 8 GB')",
    "empty": "Path(sys.argv[2]).write_text('[]')",
    "torn": "Path(sys.argv[2]).write_text('[{')",
    "hanging": "os.fork(); print('process', os.getpid(), flush=True); time.sleep(60)",
    "second": "if Path('tried').exists(): write(what='from the second try', measured=1.0)\n"
              "else: Path('tried').touch(); print('no luck', file=sys.stderr); sys.exit(5)",
}  # fmt: skip
EARLIER = {
    "good": [("a ratio", 1.2, "x")], "worse": [("another ratio", 1.0, "x")], "noisy": [("seconds", 1.0, " s")],
    "slower": [("a rate", 10.0, " per second")], "failing": [("too much", 3.0, "x")],
}  # fmt: skip
FIGURES = """
what              goal                   before         measured
a ratio           at most 2x             1.2x           1.3x          pass
another ratio     at most 2x             1x             1.12x         pass, worse by 12 %
a rate            at least 3 per second  10 per second  7 per second  pass, worse by 43 %
seconds           at most 2 s            1 s            1.2 s         pass
not there before  at most 2x             -              1x            pass
too much          at most 2x             3x             3x            FAIL
"""
FAILURES = """
killed.py            -           -         FAILED twice: killed by SIGKILL (out of memory?)
raising.py           -           -         FAILED twice: no rows, exit code 1: MemoryError: of 8 GB
empty.py             -           -         FAILED twice: no rows, exit code 0
torn.py              -           -         FAILED twice: no rows, exit code 0
"""


@pytest.fixture
def table_of(benchmarks_path, monkeypatch, tmp_path, capfd):
    """Calls all.py for some of the FAKES: -> (exit code, standard output and error, what it wrote as JSON)."""
    everything = importlib.import_module("all")
    for name, body in FAKES.items():
        (tmp_path / f"{name}.py").write_text(WRITES + body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(everything, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(everything, "SCRIPTS", tuple(FAKES))
    monkeypatch.setattr(everything, "machine", lambda: "a machine")

    def call(*arguments, limit=60):
        monkeypatch.setattr(everything, "LIMIT_SECONDS", limit)
        code = everything.main([str(argument) for argument in arguments])
        written = sorted(tmp_path.glob("results/*.json"))
        return code, *capfd.readouterr(), json.loads(written[-1].read_text()) if written else None

    return call


def test_figures_are_compared_with_earlier_ones(table_of, tmp_path):
    results = [
        {"script": script, "failures": [], "rows": [ROW | {"what": what, "measured": measured, "unit": unit}]}
        for script, ((what, measured, unit),) in EARLIER.items()
    ]
    before = {"machine": "the same", "date": "2026-11-27", "commit": "abc", "results": results}
    (tmp_path / "before.json").write_text(json.dumps(before))
    names = FIGURES.count("\n") - 2
    code, out, _, written = table_of("--compare", "before.json", "--only", *list(FAKES)[:names])
    assert code == 1 and f"a machine\nbefore: 2026-11-27, commit abc, the same\n{FIGURES}" in out
    assert written["machine"] == "a machine" and len(written["results"]) == names
    assert written["results"][0]["rows"] == [ROW | {"what": "a ratio", "measured": 1.3}]
    (table,) = tmp_path.glob("results/*.json")
    assert table_of("--compare", table, "--only", "good")[0] == 0


def test_a_script_without_rows_has_two_tries_and_a_line(table_of):
    code, out, error, written = table_of("--only", "killed", "raising", "empty", "torn", "second")
    assert code == 1 and FAILURES in out and "a word before" in error
    last = "from the second try  at most 2x  1x        pass, 2nd try; 1st: exit code 5: no luck\n"
    assert f"{FAILURES.rstrip().splitlines()[-1]}\n{last}" in out
    assert [len(result["failures"]) for result in written["results"]] == [2, 2, 2, 2, 1]


def test_a_script_that_hangs_is_ended_with_what_it_started(table_of):
    code, out, error, _ = table_of("--only", "hanging", limit=0.5)
    assert code == 1 and "FAILED twice: not done after 0.5 s" in out
    processes = [Path("/proc", line.split()[1], "cmdline") for line in error.splitlines() if "process" in line]
    assert len(processes) == 4
    assert not any(path.exists() and path.read_bytes() for path in processes)  # empty: ended, not yet collected


def test_a_file_that_is_no_table_is_one_line(table_of, tmp_path):
    (tmp_path / "other.json").write_text('{"machine": 1, "results": [{"rows": [{"what": 3}]}]}')
    for name, found in (("other.json", "something else"), ("none.json", "no file")):
        code, out, error, written = table_of("--compare", name)
        assert (code, out, written) == (2, "", None)
        assert error == f"error: {name}: found {found}, expected results of this script; see --help\n"
