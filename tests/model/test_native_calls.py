"""How kernels in C++ are called: with what, and when not at all."""

import os
import re
import subprocess
import sys

import pytest
import torch

from model import native
from tests.model.test_native import pytestmark as pytestmark
from tests.model.test_native import random


def test_a_whole_number_where_a_kernel_takes_a_float_is_the_same_number():
    x, weight = (random(4, 64, seed=s).detach() for s in (0, 1))
    outs = [torch.empty(4, 64) for _ in range(2)]
    for eps, out in zip((1, 1.0), outs, strict=True):
        native.call("rms_norm", x, weight[0], out, False, torch.empty(4), 4, 64, eps)
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    torch.testing.assert_close(outs[0], torch.nn.functional.rms_norm(x, (64,), weight[0], 1.0))


def test_the_types_of_arguments_are_those_that_the_sources_declare():
    text = "".join(path.read_text().split('extern "C" {')[-1] for path in native.SOURCES.glob("*.cpp"))
    declared = re.findall(r"^void (\w+)\(([^)]*),\s+int threads\)", text, re.MULTILINE)
    letters = {name: ["p" if "*" in a else a.split()[0][0] for a in given.split(",")] for name, given in declared}
    assert {name: "".join(kinds).replace("l", "n") for name, kinds in letters.items()} == native.ARGUMENTS


def test_kernels_can_be_switched_off():
    command = "import torch; from model import native; print(native.usable(torch.zeros(native.SMALL)))"
    said = {
        value: subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"GRISTMILL_NATIVE": value},
            capture_output=True,
            text=True,
        ).stdout.strip()
        for value in ("0", "1")
    }
    assert said == {"0": "False", "1": "True"}


def test_a_call_on_a_tensor_with_gaps_is_refused():
    with pytest.raises(AssertionError, match="contiguous"):
        native.call("swiglu", random(4, 4).detach().T, random(4, 4).detach(), random(4, 4).detach(), 16)
