"""Shared fixtures. Environment variables are set here because jax reads them
when it is first imported."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = (
    pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    / "rlbf_jax"
    / "tests"
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# Tests compile much and compute little. LLVM's costly passes and XLA's emitters of fused loops,
# which are made for speed of what they compile, would make the suite take twice as long.
QUICKLY_COMPILED = (
    "--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # XLA ends a process that names a flag it does not know, and later ones do not know this one.
    QUICKLY_COMPILED += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICKLY_COMPILED)
# jax's defaults skip programs as small as a test's.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and dtypes of these modules' arguments and results are checked while tests run. The hook
# works on what is imported after it.
CHECKED = [
    "rlbf_jax.directives.layout",
    "rlbf_jax.models.attention",
    "rlbf_jax.models.kv_cache",
    "rlbf_jax.models.prefixed",
    "rlbf_jax.objectives.masked",
    "rlbf_jax.objectives.policy",
    "rlbf_jax.objectives.sft",
    "rlbf_jax.sampling.distribution",
    "rlbf_jax.sampling.scoring",
]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# derandomize: a failure is there for everybody, every time. Deadlines would measure the compiler.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Lets go of compiled programs after a module, where there are many.

    Each holds several maps of memory, of which Linux gives a process 65,530: a worker that has run
    half of the suite dies of the next program.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Folder of public data sets; the test skips where there is none."""
    folder = os.environ.get("RLBF_JAX_DATA")
    if not folder:
        pytest.skip("RLBF_JAX_DATA is not set: point it at the folder with the public data files")
    if not pathlib.Path(folder).is_dir():
        pytest.fail(f"RLBF_JAX_DATA={folder} is not a folder")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of a finished run of `tests.small_run`; do not write into it."""
    from rlbf_jax.runs.execute import run
    from tests.small_run import get_config

    folder = tmp_path_factory.mktemp("small") / "run"
    run(get_config(), folder)
    return folder


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that the guards of online training said."""
    from rlbf_jax.training import guards

    lines: list[str] = []
    monkeypatch.setattr(guards, "say", lines.append)
    return lines


def _run_in_child(program: str, *args: str, devices: int = 8, timeout: float = 240) -> str:
    """Runs Python source, or a script's path, in a process of its own with virtual CPU devices.

    Returns what it wrote to stdout. A child that fails or takes longer than `timeout` seconds fails
    the test with the end of its output; it is ended with SIGKILL, because a process in
    `jax.distributed` swallows SIGTERM.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{QUICKLY_COMPILED} --xla_force_host_platform_device_count={devices}",
        # Collectives of virtual devices wait for each other in XLA's thread pool,
        # which must outnumber them.
        "NPROC": str(max(16, 2 * devices)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
    }
    is_script = "\n" not in program and program.endswith(".py")
    command = [sys.executable, *([program] if is_script else ["-c", program]), *args]
    child = subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        pytest.fail(f"child process still ran after {timeout:.0f} s\n{out[-2000:]}\n{err[-4000:]}")
    if child.returncode != 0:
        pytest.fail(f"child process ended with {child.returncode}\n{out[-2000:]}\n{err[-4000:]}")
    return out


@pytest.fixture(scope="session")
def run_in_child() -> Callable[..., str]:
    """`run_in_child(source_or_script, *args, devices=8, timeout=240) -> stdout`."""
    return _run_in_child
