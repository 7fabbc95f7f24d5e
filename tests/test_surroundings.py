"""The command line in surroundings that are not as they should be: one line, or it goes on."""

import io
import os
import subprocess
import sys

import pytest

from rlbf_jax.cli import main as cli
from rlbf_jax.cli.surroundings import check_environment, mend_streams
from rlbf_jax.errors import UserError, machine_error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_ENABLE_X64", "1"),
        ("JAX_ENABLE_X64", "True"),
        ("JAX_DEFAULT_DTYPE_BITS", "64"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
        ("JAX_NUMPY_RANK_PROMOTION", "raise"),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg"),
        ("JAX_DEBUG_NANS", "true"),
        ("JAX_DEBUG_INFS", "1"),
    ],
)
def test_settings_of_jax_under_which_nothing_holds_are_refused(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert cli.main(["report", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: the environment sets {name}={value}, under which results would be others, or "
        f"none: unset {name}\n"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_ENABLE_X64": "0", "JAX_DEBUG_NANS": "False", "JAX_DEFAULT_DTYPE_BITS": "32"},
        {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"},
        {"JAX_DEFAULT_PRNG_IMPL": "threefry2x32", "JAX_ENABLE_X64": ""},
    ],
)
def test_settings_that_change_nothing_are_fine(environment):
    check_environment(environment)


def test_refusal_names_the_setting():
    with pytest.raises(UserError, match="unset JAX_ENABLE_X64"):
        check_environment({"JAX_ENABLE_X64": "yes"})


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_device_that_is_not_there(platform):
    """What JAX itself says, in a process that has not met a device yet."""
    code = (
        "import sys; from rlbf_jax.cli.main import exit_code\n"
        "def command():\n    import jax; jax.devices()\n"
        "sys.exit(exit_code(command, 'again'))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": platform},
    )
    last = child.stderr.splitlines()[-1]
    assert child.returncode == 2 and "Traceback" not in child.stderr
    assert last.startswith("error: JAX finds no such device") and f"'{platform}'" in last


def test_other_errors_are_ours():
    assert machine_error(RuntimeError("something else")) == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_characters_that_a_terminal_has_not_are_escaped(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    mend_streams()
    print("The caf\u00e9 is \u6f22")
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert text.startswith("The caf") and ("\u6f22" in text) == (encoding == "utf-8")
    assert ("\\u6f22" in text) == (encoding != "utf-8")


@pytest.mark.parametrize("stream", ["stdout", "stderr", "stdin"])
def test_a_closed_stream_loses_what_is_written_and_nothing_else(stream, monkeypatch):
    monkeypatch.setattr(sys, stream, None)
    mend_streams()
    if stream == "stdin":
        assert sys.stdin.read() == "" and not sys.stdin.isatty()
    else:
        print("lost", file=getattr(sys, stream))
        assert not getattr(sys, stream).isatty()
    getattr(sys, stream).close()


def test_a_command_without_standard_output_ends_well():
    child = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m rlbf_jax.cli.main --help >&-"],
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stderr) == (0, "")
