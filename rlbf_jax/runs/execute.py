"""Runs an experiment in a folder: stages in order, finished ones skipped,
broken ones resumed, a report at the end."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rlbf_jax.errors import Preempted, UserError
from rlbf_jax.parallel import hosts
from rlbf_jax.parallel.mesh import make_mesh
from rlbf_jax.progress import say
from rlbf_jax.report.document import write_report
from rlbf_jax.runs import start
from rlbf_jax.runs.critics import CriticConfig, check_critic
from rlbf_jax.runs.evaluate import evaluation_stages
from rlbf_jax.runs.experiment import Experiment
from rlbf_jax.runs.files import write_json
from rlbf_jax.runs.manifest import open_workdir
from rlbf_jax.runs.model_critic import check_model
from rlbf_jax.runs.processes import agree, check_shared
from rlbf_jax.runs.run import Parts, Run
from rlbf_jax.runs.settings.own_data import OWN_DATA
from rlbf_jax.runs.settings.toy import TOY
from rlbf_jax.runs.stage import Stage, lineage
from rlbf_jax.runs.tradeoff import calibration_stages
from rlbf_jax.storage import held, sweep


def run(e: Experiment, workdir: str | Path, only: Collection[str] | None = None) -> None:
    """Runs an experiment to its report.

    Args:
      only: names of the stages to run, the others being there already (`adopt`)
        or not wanted; None: all.

    Raises UserError for what a user can mend, Preempted after a signal.
    """
    if not isinstance(e, Experiment):
        raise UserError(
            f"expected an Experiment, as `Experiment(method=...)`; got a {type(e).__name__}"
        )
    workdir = Path(workdir)
    every = recipe(e)
    stages = [stage for stage in every if only is None or stage.name in only]
    whole = Run(parts_of(e, workdir))
    views = {stage.name: view(whole, every, stage) for stage in every}
    _check_sources(e, whole)
    for stage in stages:
        stage.check(views[stage.name], stage.config)
    agree(e, workdir)
    hosts.first_alone(lambda: open_workdir(e, every, workdir))
    check_shared(workdir / "manifest.json")
    began, name = time.perf_counter(), ""
    try:
        with alone_in(workdir):
            for number, stage in enumerate(stages, 1):
                name = stage.name
                if not stage.prepares and _first_to_train(stages, stage):
                    _fit(e, whole, stages, views)
                run_stage(views[name], stage, f"[{number}/{len(stages)}]")
            name = "report"
            hosts.first_alone(lambda: write_report(workdir))
    except KeyboardInterrupt:
        kept = "finished stages and checkpoints are kept"
        raise Preempted(
            f"stopped in stage {name}; {kept}" if name else f"stopped; {kept}"
        ) from None
    say(f"finished in {time.perf_counter() - began:.0f} s; open {workdir / 'report.html'}")


def recipe(e: Experiment) -> list[Stage]:
    """All stages of an experiment: the method's, then an evaluation of each model it keeps.

    Raises UserError for settings that do not go together, ValueError for a method
    whose stages are out of order.
    """
    if e.rule not in e.rules:
        raise UserError(
            f"data.rules is {', '.join(e.rules)}; method {e.method.name} needs {e.rule} among them"
        )
    stages = list(e.method.stages(e))
    stages += [*calibration_stages(e, stages), *evaluation_stages(e, stages)]
    for stage in stages:
        lineage(stages, stage.name)
    return stages


def parts_of(e: Experiment, workdir: Path) -> Parts:
    """A run's parts: of the user's own data where the experiment names a file, of the toy world
    otherwise. Raises UserError for a mesh that cannot be made."""
    try:
        mesh = make_mesh(e.mesh)
    except ValueError as error:
        raise UserError(f"mesh: {error}") from error
    setting = OWN_DATA if e.data.path else TOY
    untrained = functools.partial(start.model_of, e.base, workdir)
    return Parts(workdir, e.seed, e.data, setting, mesh, untrained)


def view(whole: Run, stages: Sequence[Stage], stage: Stage) -> Run:
    """The run as a stage may see it: its own result and those of what it comes after."""
    return whole.seen_by(stage.name, lineage(stages, stage.name))


def _check_sources(e: Experiment, whole: Run) -> None:
    """Reads what cannot be made again (a data file, a critic's model):
    if it cannot be used, no folder is left behind."""
    _ = whole.world, whole.base_model
    critic = getattr(e.method, "critic", None)
    if isinstance(critic, CriticConfig):
        if critic.critic or critic.critic_classifier.path:
            whole.critic(critic)
        check_critic(critic)
    if e.judge_model:
        check_model(e.judge_model, "judge_model")


def _first_to_train(stages: Sequence[Stage], stage: Stage) -> bool:
    return stage is next(s for s in stages if not s.prepares)


def _fit(e: Experiment, whole: Run, stages: Sequence[Stage], views: dict[str, Run]) -> None:
    """Whether text and shapes fit, before the training that they would break;
    not asked again once something was trained."""
    left = [s for s in stages if not s.prepares and not _done(whole, s).exists()]
    if len(left) < sum(not s.prepares for s in stages):
        return
    whole.setting.check(whole, e.max_prompt)
    for stage in left:
        stage.fit(views[stage.name], stage.config)


def _done(whole: Run, stage: Stage) -> Path:
    return whole.folder / "done" / stage.name


def run_stage(mine: Run, stage: Stage, number: str) -> None:
    """Runs a stage unless it is done. The marker in done/ comes last:
    all that it stands for is on disk by then."""
    done = _done(mine, stage)
    if hosts.from_first(done.exists):
        return
    started = time.perf_counter()
    if stage.prepares:
        hosts.first_alone(lambda: stage.do(mine, stage.config))
    else:
        stage.do(mine, stage.config)
    seconds = time.perf_counter() - started
    hosts.first_alone(lambda: write_json(done, {"seconds": round(seconds, 1)}))
    check_shared(done)
    if stage.prepares or stage.evaluated:
        say(f"{number} {stage.name}: {seconds:.1f} s")


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of the folder, and clears away what killed ones left half-written.

    Raises UserError if another process is running there.
    """
    if not hosts.is_first():  # the processes of one run share its folder; the first answers
        yield
        return
    (workdir / "done").mkdir(exist_ok=True)
    with held(workdir / "done", wait=False) as mine:
        if not mine:
            raise UserError(
                f"{workdir}: another process is running here; let it end, or choose another "
                "--workdir"
            )
        sweep(workdir)
        yield
