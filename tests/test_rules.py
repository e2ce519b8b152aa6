"""Rules of the whole tree: what must not be imported, loaded or slow."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = sorted(p for folder in ("model", "pipeline", "jobs") for p in Path(folder).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "dcp.load", "numpy.load_pickle", "eval", "exec"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_is_unpickled(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & UNSAFE_MODULES
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE_MODULES
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNSAFE_CALLS
            assert not any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_file_can_be_read_in_one_sitting(path: Path):
    assert len(path.read_text().splitlines()) <= 400


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}, check=False)


def test_help_needs_no_heavy_import():
    code = """
import sys
from jobs.cli import app
app(["--help"], exit_on_error=False, result_action="return_value")
heavy = {"torch", "ray", "mlflow", "transformers", "sklearn", "pydantic", "numpy", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_help_costs_less_than_twice_the_libraries_that_draw_it():
    """CPU time, side by side: seconds alone would say how fast the machine is. One import of pyarrow makes it 2.2."""
    code = """
import resource, subprocess, sys

def seconds(*arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

pairs = [(seconds("-c", "import cyclopts.help, rich.markdown"), seconds("-m", "jobs.cli", "--help")) for _ in range(5)]
libraries, ours = (min(column) for column in zip(*pairs))
print(ours / libraries)
"""
    assert float(run(sys.executable, "-c", code).stdout) < 2.0


def test_a_command_does_not_pay_for_torchs_compiler():
    """Its import takes seconds, and every process of a run would pay them."""
    code = "import pipeline.assemble, model.generate, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert run(sys.executable, "-c", code).returncode == 0
