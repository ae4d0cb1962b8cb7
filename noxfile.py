"""The versions that the suite is tested with: `pip install nox && nox` (6 GB of disk for each environment).

    nox -s tests            the newest packages, on every Python that is supported and found
    nox -s floors           the oldest packages that requirements.txt names, on the oldest Python
    nox -s package          pip install from the folder and from git; modules and commands from another folder

An interpreter that is not found is skipped. What follows `--` goes to pytest.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
MODULES = ("ctclip", "ctclip_model", "ctclip_setup", "ctclip_training", "ctclip_evaluation", "run_task2")
COMMANDS = ("ctclip-setup", "ctclip-train", "ctclip-evaluate", "ctclip-task2")

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    session.install("-e", f"{ROOT}[dev]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.10")
def floors(session: nox.Session) -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line.partition("#")[0].partition(";")[0].strip() for line in lines]
    session.install(*(requirement.replace(">=", "==") for requirement in requirements if requirement))
    session.install("--no-deps", "-e", str(ROOT))
    session.run("pytest", *session.posargs)


@nox.session(python="3.12")
def package(session: nox.Session) -> None:
    for source in (str(ROOT), f"git+{ROOT.as_uri()}"):
        session.install("--force-reinstall" if "git+" in source else "--upgrade", source)
        session.chdir(session.create_tmp())
        session.run("python", "-c", f"import {', '.join(MODULES)}; print(ctclip.__version__)")
        for command in COMMANDS:
            session.run(command, "--help", silent=True)
            session.run(command, "--version")
